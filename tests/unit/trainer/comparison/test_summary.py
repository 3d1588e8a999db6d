"""Several comparisons beside each other, and results that are kept with the sources."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.trainer.comparison.test_schedule import comparison, outcome, run_all
from trainer.comparison import jobs as jobs_module
from trainer.comparison.jobs import Jobs
from trainer.comparison.kept import KEPT, _said, read_kept, write_kept
from trainer.comparison.runner import Limits, Part, compare
from trainer.comparison.schedule import Schedule
from trainer.comparison.summary import draw_summary, summary
from trainer.comparison.survivors import by_chance, jaccard, similarity
from trainer.comparison.table import rows


def finished(folder, made=outcome):
    schedule = Schedule(Jobs(comparison(), folder), "c0de")
    run_all(schedule, made)
    return schedule


def test_a_summary_counts_what_arms_win_and_lose(tmp_path):
    def without(job, schedule):
        """`half` no better than LoRA of its size, and `twin` worse."""
        loss = {"half": 1.1, "twin": 1.2}.get(job.method)
        return outcome(job, schedule, loss)

    schedules = {"a": finished(tmp_path), "b": finished(tmp_path, without)}
    tables = {name: (one, rows(one)) for name, one in schedules.items()}
    lines = summary(tables).splitlines()
    assert lines[0] == "| arm | wins | ties | loses | a | b |"
    half, twin = lines[2:4]  # `same` is compared with another arm than LoRA
    assert half.startswith("| half | 1 | 1 | 0 | **-0.20") and "] | +0.0000 [" in half
    assert twin.startswith("| twin | 0 | 1 | 1 | ") and "| *+0.2" in twin
    assert lines[4] == "" and "a: eval_loss; b: eval_loss" in lines[5]
    draw_summary(tables, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_is_not_complete_wins_nothing(tmp_path):
    def broken(job, schedule):
        result = outcome(job, schedule)
        if job.method == "half" and not job.selects and job.seed == 1:
            kept = {k: result[k] for k in ("method", "learning_rate", "seed", "config", "code")}
            return kept | {"error": "Diverged: NaN", "diverged": True}
        return result

    schedule = finished(tmp_path, broken)
    line = next(x for x in summary({"a": (schedule, rows(schedule))}).splitlines() if "half" in x)
    assert line.startswith("| half | 0 | 0 | 0 | -0.2") and "1 of 3 failed" in line


def test_kept_results_make_the_same_table_in_any_version(tmp_path, monkeypatch):
    made = finished(tmp_path)
    write_kept(made, tmp_path / "kept")
    # Other keys of the configuration, hence other digests.
    own = jobs_module._digest
    monkeypatch.setattr(jobs_module, "_digest", lambda config: f"another {own(config)}")
    jobs = Jobs(comparison(), tmp_path)
    read = read_kept(jobs, tmp_path / "kept")
    assert {one["config"] for one in read}.isdisjoint({one["config"] for one in made.results})
    part = Part(comparison(), tmp_path / "kept", Limits(any_code=True), lambda text: None)
    before, after = ({row.arm: row for row in rows(s)} for s in (made, part.schedule))
    assert before.keys() == after.keys()
    for arm, row in before.items():
        assert row.mean == pytest.approx(after[arm].mean, rel=1e-5)
        if row.difference is not None:
            assert row.difference.low == pytest.approx(after[arm].difference.low, abs=1e-5)
    assert (tmp_path / "kept" / KEPT).stat().st_size < 60_000


def test_kept_results_are_of_what_the_file_says_and_join_those_of_other_arms(tmp_path):
    write_kept(finished(tmp_path), tmp_path)
    arms = dict(comparison().methods)
    changed = comparison(methods={**arms, "half": arms["half"].model_copy(
        update={"overrides": [*arms["half"].overrides, "method.dropout=0.5"]}
    )})  # fmt: skip
    read = {one["method"] for one in read_kept(Jobs(changed, tmp_path), tmp_path)}
    assert read == {"lora", "twin", "lora r=1", "lora r=5"}  # `same` is like `half`
    fewer = comparison(methods={"lora": arms["lora"]}, lora_ranks=[8])
    write_kept(Schedule(Jobs(fewer, tmp_path), None), tmp_path)
    assert {one["method"] for one in read_kept(Jobs(comparison(), tmp_path), tmp_path)} > read


def test_nothing_is_kept_of_a_comparison_without_runs(tmp_path):
    """Else its tables would be made, of no row."""
    write_kept(Schedule(Jobs(comparison(), tmp_path), None), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_kept_results_of_random_matrices_are_of_no_other_control(tmp_path):
    """Nor of another allocation."""
    found, other = ["method.kind=lelora"], ["method.kind=lelora", "method.wake=at_once"]

    def jobs(**control):
        arms = {"found": found, "other": other, "random": {"overrides": found, **control}}
        return Jobs(comparison(methods={"lora": [], **arms}, lora_ranks=[]), tmp_path)

    runs = {"learning_rate": 1e-3, "seed": 0, "selects": False, "error": "x"}
    results = [{"method": method, **runs} for method in ("found", "random")]
    write_kept(
        SimpleNamespace(jobs=jobs(replays="found", permuted="any"), results=results), tmp_path
    )

    def read(**control):
        return [one["method"] for one in read_kept(jobs(**control), tmp_path)]

    assert read(replays="found", permuted="any") == ["found", "random"]
    for control in (
        {"replays": "found", "permuted": True}, {"replays": "found"}, {},
        {"replays": "other", "permuted": "any"},
    ):  # fmt: skip
        assert read(**control) == ["found"]


def test_digests_of_arms_that_were_kept_before_are_the_same():
    """SHA-256 of base, overrides, selection and the arm's own overrides alone."""
    control = {"replays": "half", "overrides": ["method.keep=2"]}
    arms = {"lora": [], "half": ["method.kind=weightlora"],
            "same": control, "permuted": {**control, "permuted": True}}  # fmt: skip
    plan = comparison(methods=arms)
    said = [plan.base, plan.overrides, plan.selection, ["method.keep=2"]]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
    for name in ("same", "permuted"):
        assert _said(Jobs(plan, Path()), name) == digest


def test_the_command_writes_a_summary_of_several(tmp_path):
    for name in ("a", "b"):
        write_kept(finished(tmp_path), tmp_path / name)
    compare(
        [(comparison(), tmp_path / name) for name in ("a", "b")],
        Limits(minutes=0, any_code=True), beside=tmp_path / "summary", keep=tmp_path / "again",
        report=lambda text: None,
    )  # fmt: skip
    assert "| half | 2 | 0 | 0 |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "again/b" / KEPT).exists() and (tmp_path / "summary.png").exists()


def test_similarity_of_survivors_is_intersection_over_union(tmp_path):
    assert jaccard([8, 0, 2, 0], [1, 1, 1, 0]) == 2 / 3 and jaccard([0, 0], [0, 0]) == 1
    assert by_chance([1, 1, 0, 0], [1, 0, 1, 0]) == pytest.approx(1 / 3)

    def selected(job, schedule):
        result = outcome(job, schedule)
        if job.selects or job.method not in ("half", "same"):
            return result
        units = {0: [8, 8, 0, 0], 1: [8, 0, 8, 0], 2: [8, 8, 0, 0]}
        return result | {"held": [4, 0, 0, 4] if job.method == "same" else units[job.seed]}

    lines = similarity(finished(tmp_path, selected)).splitlines()
    # seeds of half: {0, 1}, {0, 2}, {0, 1}: 1/3, 1, 1/3; same is {0, 3}: 1/3 of each
    assert lines[2] == f"| half, between seeds | {5 / 9:.3f} | {1 / 3:.3f} | 3 |"
    assert lines[3] == "| same, between seeds | 1.000 | 0.333 | 3 |"
    assert lines[4] == "| same and half, same seed | 0.333 | 0.333 | 3 |"
    assert similarity(finished(tmp_path)) == ""
