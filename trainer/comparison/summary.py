"""Several comparisons beside each other: where each arm wins, ties and loses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.comparison.schedule import Schedule
from trainer.comparison.statistics import CONFIDENCE, MEASURES
from trainer.comparison.table import Row

Table = tuple[Schedule, Sequence[Row]]


def against_lora(tables: Mapping[str, Table]) -> dict[str, dict[str, Row]]:
    """Rows by arm and comparison, of the arms that are compared with a LoRA of equal or more
    parameters; the arms with the most wins less losses first."""
    found: dict[str, dict[str, Row]] = {}
    for name, (schedule, rows) in tables.items():
        for row in rows:
            if row.against is not None and schedule.is_lora(row.against):
                found.setdefault(row.arm, {})[name] = row

    def place(arm: str) -> tuple[int, str]:
        verdicts = [_verdict(tables[name], row) for name, row in found[arm].items()]
        return verdicts.count("loses") - verdicts.count("wins"), arm

    return {arm: found[arm] for arm in sorted(found, key=place)}


def summary(tables: Mapping[str, Table]) -> str:
    """A Markdown table of arms by comparisons; `tables`: schedule and rows by name."""
    lines = [
        f"| arm | wins | ties | loses | {' | '.join(tables)} |", "|---" * (4 + len(tables)) + "|"
    ]  # fmt: skip
    for arm, rows in against_lora(tables).items():
        verdicts = [_verdict(tables[name], row) for name, row in rows.items()]
        counts = [str(verdicts.count(kind)) for kind in ("wins", "ties", "loses")]
        cells = [_cell(tables[name], rows.get(name)) for name in tables]
        lines.append(f"| {' | '.join([arm, *counts, *cells])} |")
    measures = [
        f"{name}: {schedule.jobs.comparison.score}" for name, (schedule, _) in tables.items()
    ]
    note = (
        f"Score minus that of LoRA of equal or more trained parameters, with its interval of "
        f"{CONFIDENCE:.0%}; **wins** and *loses* where it excludes 0, over all seeds, and not "
        f"corrected for the number of rows. {'; '.join(measures)} (of a loss less is better)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def _less_is_better(schedule: Schedule) -> bool:
    return MEASURES[schedule.jobs.comparison.score].less_is_better


def _verdict(table: Table, row: Row) -> str:
    return row.verdict(_less_is_better(table[0]))


def _cell(table: Table, row: Row | None) -> str:
    if row is None or row.difference is None:
        return ""
    change, verdict = row.difference, _verdict(table, row)
    mark = {"wins": "**", "loses": "*"}.get(verdict, "")
    rest = "" if verdict in ("wins", "ties", "loses") else f", {verdict}"
    rest += ", rate at an edge" if row.is_edge else ""
    return f"{mark}{change.estimate:+.4f}{mark} [{change.low:+.4f}, {change.high:+.4f}]{rest}"


def draw_summary(tables: Mapping[str, Table], target: Path) -> None:
    """The differences from LoRA with their intervals, a panel for each comparison, right of 0 where
    the arm is better. Draws nothing without differences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(against_lora(tables))[::-1]
    if not arms:
        return
    columns = min(4, len(tables))
    lines = -(-len(tables) // columns)
    size = (3 * columns + 2, lines * (0.22 * len(arms) + 1.2))
    figure, panels = plt.subplots(
        lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(tables) :]:
        panel.axis("off")
    for panel, (name, (schedule, rows)) in zip(panels.flat, tables.items(), strict=False):
        sign = -1 if _less_is_better(schedule) else 1
        for row in rows:
            if row.arm not in arms or (change := row.difference) is None:
                continue
            ends = sorted((sign * change.low, sign * change.high))
            middle, verdict = sign * change.estimate, row.verdict(sign < 0)
            color = {"wins": "C2", "loses": "C3"}.get(verdict, "0.5")
            bars = [[middle - ends[0]], [ends[1] - middle]]
            panel.errorbar(
                [middle], [arms.index(row.arm)], xerr=bars, fmt="o", color=color, capsize=2
            )
        panel.axvline(0, color="k", linewidth=0.8)
        panel.set_yticks(range(len(arms)), arms, fontsize="x-small")
        score = schedule.jobs.comparison.score
        panel.set_title(f"{name}\n{'−' if sign < 0 else ''}{score}", fontsize="small")
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(axis="x", labelsize="x-small")
        panel.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    plt.close(figure)
