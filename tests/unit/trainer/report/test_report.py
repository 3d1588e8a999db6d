"""Figures of synthetic runs show what the runs say; a broken folder ends in one line."""

import json
import os
import runpy
import sys

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from adapters.banks import LOCATIONS
from adapters.figures import BUDGET
from adapters.methods.registry import METHODS
from adapters.unit import Unit
from trainer.errors import UserError
from trainer.report import allocation_history, allocation_plots
from trainer.report import report as reports
from trainer.report.report import jaccard, read_run, report, survivors

TYPES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def make_units(layers, types=TYPES, other=()):
    inside = [(f"model.layers.{i}.{kind}", i, kind) for i in range(layers) for kind in types]
    return [
        {"name": name, "layer": layer, "kind": kind, "out_features": 64, "in_features": 64}
        for name, layer, kind in [*inside, *((name, None, name) for name in other)]
    ]


def write_lines(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder, kind, units=(), decisions=(), metrics=(), steps=8, seed=0, rank=8):
    """A run folder with a falling loss, `metrics` merged in by step, and the given decisions."""
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name, "dir": str(folder.parent), "seed": seed, "steps": steps},
        "method": {"kind": kind, "rank": rank},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "units.json").write_text(json.dumps(list(units)))
    more = {line["step"]: line for line in metrics}
    lines = [
        {"step": s, "loss": 1 + 2 / s, "learning_rate": 1e-3, "active_parameters": 1000,
         "trainable_parameters": 2000, "step_seconds": 0.5, **more.get(s, {})}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    write_lines(folder / "metrics.jsonl", [*lines, {"step": steps, "eval_loss": 1.5}])
    if decisions:
        write_lines(
            folder / "allocation.jsonl", [{"method": kind, "digest": "0", **d} for d in decisions]
        )
    return folder


def realistic(folder, kind, layers=4, steps=60, seed=0):
    """A run as a method of that kind would leave it, with made-up but plausible decisions."""
    generator = np.random.default_rng(seed)
    units = make_units(layers)
    names = [unit["name"] for unit in units]
    depth = np.array([unit["layer"] / layers for unit in units])
    decisions, metrics = [], []
    if kind == "lelora":
        for s in range(steps):
            rank = generator.binomial(4, 0.2 + 0.6 * depth * s / steps) * 2
            where = generator.random(len(names)) * 0.7 + (depth - 0.3) * s / steps
            chosen = np.digitize(-where, [-0.6, -0.3])
            decisions.append(
                {"step": s, "ranks": dict(zip(names, rank.tolist())),
                 "locations": {n: LOCATIONS[c] for n, c in zip(names, chosen)}}
            )  # fmt: skip
            metrics.append(
                {"step": s + 1, "method/reward": -1 / (s + 1), "method/baseline": -1 / (s + 2),
                 "method/entropy_rank": 1.6 - s / steps, "method/entropy_location": 1.1 - s / steps,
                 "method/distinct_actions": int(12 - 8 * s / steps), "method/mean_rank": 4.0}
            )  # fmt: skip
    elif kind in ("adalora", "lalora"):
        for s in range(0, steps, 1 if kind == "lalora" else 5):
            share = np.exp(2 * depth + 0.2 * generator.normal(size=len(names)) + s / steps)
            rank = np.clip(np.round(3 * share), 1, 8).astype(int).tolist()
            by_layer = {str(unit["layer"]): r for unit, r in zip(units, rank)}
            ranks = by_layer if kind == "lalora" else dict(zip(names, rank))
            decisions.append({"step": s, "ranks": ranks})
            mean = float(np.mean(list(ranks.values())))
            metrics.append(
                {"step": s + 1, "method/budget": sum(ranks.values()), "method/mean_rank": mean}
            )
    elif kind.startswith("weightlora"):
        importance = depth + 0.5 * np.random.default_rng(99).normal(size=len(names))
        omega, warmup = np.ones(len(names)), 6
        for s in range(warmup + 1):
            if s:
                omega = omega + 1e-3 * (importance + 0.3 * generator.normal(size=len(names)))
                omega[np.argsort(omega)[: len(names) // 2]] = 0
            decisions.append({"step": s, "omega": dict(zip(names, omega.tolist()))})
        kept = [n for n, w in zip(names, omega) if w > 0]
        decisions[-1] |= {"survivors": kept, "ranks": dict.fromkeys(kept, 8)}
        metrics = [
            {"step": s, "method/survivors": len(names), "method/omega_spread": 0.01}
            for s in range(1, warmup)
        ]
    elif kind == "rlora":
        kept = sorted(generator.choice(names, len(names) // 2, replace=False).tolist())
        decisions = [{"step": 0, "survivors": kept, "ranks": dict.fromkeys(kept, 8)}]
    elif kind == "dylora":
        decisions = [
            {"step": s, "ranks": {"all": int(generator.integers(1, 9))}} for s in range(steps)
        ]
    return write_run(folder, kind, units, decisions, metrics, steps, seed)


def check_figure(figure):
    """Title, labels with a unit where there is a quantity, and a legend where several are drawn."""
    assert isinstance(figure, Figure)
    plots = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert figure.get_suptitle() or all(axes.get_title() for axes in plots)
    assert plots[-1].get_xlabel() and plots[0].get_ylabel()
    for axes in plots:
        drawn = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert len(drawn) < 2 or axes.get_legend() or figure.legends


def check_images(folder, names):
    assert {file.name for file in folder.iterdir()} == {
        f"{name}.{suffix}" for name in names for suffix in ("png", "svg")
    }
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 400 and image.height > 250
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, "an empty picture"
        assert "</svg>" in (folder / f"{name}.svg").read_text()[-100:]


FIGURES = {
    "lora": ["loss", "optimizer"],
    "lelora": ["loss", "optimizer", "ranks", "ranks_by_type", "locations", "policy"],
    "lalora": ["loss", "optimizer", "ranks", "ranks_by_type", "budget"],
    "adalora": ["loss", "optimizer", "ranks", "ranks_by_type", "budget"],
    "weightlora": ["loss", "optimizer", "ranks", "ranks_by_type", "survivors", "omega"],
    "rlora": ["loss", "optimizer", "ranks", "ranks_by_type", "survivors"],
    "dylora": ["loss", "optimizer", "ranks", "ranks_by_type"],
}


@pytest.mark.parametrize("kind", FIGURES)
def test_a_run_gets_the_figures_it_has_data_for(kind, tmp_path):
    folder = realistic(tmp_path / kind, kind)
    written = report([folder])
    assert [file.stem for file in written] == FIGURES[kind]
    check_images(folder / "figures", FIGURES[kind])
    for _, figure in reports.run_figures(read_run(folder)):
        check_figure(figure)


def heat_map(folder):
    (axes, _) = allocation_plots.draw_ranks(read_run(folder).allocation, "run").axes
    (mesh,) = axes.collections
    edges = mesh.get_coordinates()[0, :, 0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return np.asarray(mesh.get_array()), edges.tolist(), labels


def test_heat_map_is_the_mean_rank_of_each_layer_until_the_next_decision(tmp_path):
    units = make_units(2, ("q", "v"), other=("head",))
    names = [unit["name"] for unit in units]
    decisions = [
        {"step": 0, "ranks": dict(zip(names, [2, 4, 8, 0, 6]))},
        {"step": 5, "ranks": dict(zip(names, [0, 0, 4, 2, 1]))},
    ]
    values, edges, labels = heat_map(write_run(tmp_path / "a", "lelora", units, decisions))
    assert values.tolist() == [[3, 0], [4, 3], [6, 1]]
    assert edges == [0, 5, 8]
    assert labels == ["0", "1", "other"]


def test_ranks_by_layer_for_all_and_after_selection(tmp_path):
    units = make_units(2, ("q", "v"))
    lalora = [{"step": 1, "ranks": {"0": 3, "1": 5}}]
    assert heat_map(write_run(tmp_path / "a", "lalora", units, lalora))[0].tolist() == [[3], [5]]
    dylora = [{"step": 0, "ranks": {"all": 3}}, {"step": 1, "ranks": {"all": 7}}]
    values = heat_map(write_run(tmp_path / "b", "dylora", units, dylora))[0]
    assert values.tolist() == [[3, 7], [3, 7]]
    names = [unit["name"] for unit in units]
    kept = [names[1], names[2], names[3]]
    weightlora = [
        {"step": 1, "omega": dict.fromkeys(names, 1.0)},
        {"step": 2, "omega": dict.fromkeys(kept, 1.1) | {names[0]: 0.0},
         "survivors": kept, "ranks": dict.fromkeys(kept, 16)},
    ]  # fmt: skip
    folder = write_run(tmp_path / "c", "weightlora_plus", units, weightlora)
    values, edges, _ = heat_map(folder)
    assert values.tolist() == [[8, 8], [8, 16]] and edges == [0, 2, 8]
    rlora = [{"step": 3, "survivors": kept}]
    values, edges, _ = heat_map(write_run(tmp_path / "d", "rlora", units, rlora))
    assert values.tolist() == [[8, 4], [8, 8]] and edges == [0, 3, 8]


def test_many_decisions_are_averaged_by_the_steps_they_held(tmp_path):
    units = make_units(1, ("q",))
    ranks = np.random.default_rng(0).integers(0, 9, 960)
    decisions = [{"step": s, "ranks": {"all": int(r)}} for s, r in enumerate(ranks)]
    values, edges, _ = heat_map(write_run(tmp_path / "a", "dylora", units, decisions, steps=960))
    assert values.shape == (1, 240) and edges[:2] == [0, 4] and edges[-1] == 960
    assert np.allclose(values[0], ranks.reshape(240, 4).mean(axis=1))


def test_decisions_of_a_resumed_run_replace_those_before(tmp_path):
    units = make_units(1, ("q",))
    decisions = [{"step": s, "ranks": {"all": r}} for s, r in [(0, 1), (4, 2), (6, 3), (4, 5)]]
    values, edges, _ = heat_map(write_run(tmp_path / "a", "dylora", units, decisions))
    assert values.tolist() == [[1, 5]] and edges == [0, 4, 8]


def test_mean_rank_by_type_and_third(tmp_path):
    units = make_units(3, ("attn.q", "mlp.up"), other=("head",))
    names = [unit["name"] for unit in units]
    decisions = [{"step": 0, "ranks": dict(zip(names, [2, 4, 6, 8, 4, 0, 1]))}]
    folder = write_run(tmp_path / "a", "lelora", units, decisions)
    figure = allocation_plots.draw_ranks_by_type(read_run(folder).allocation, "run")
    drawn = [
        {line.get_label(): line.get_data().values.tolist() for line in axes.patches}
        for axes in figure.axes
    ]
    assert drawn == [
        {"q": [4], "up": [4], "head": [1]},
        {"front (0)": [3], "middle (1)": [7], "back (2)": [2]},
    ]


def test_types_merge_experts_and_stay_distinct():
    kinds = ["mlp.experts.0.up", "mlp.experts.1.up", "attn.output.dense", "output.dense", "mlp.2"]
    units = [Unit(i, kind, 0, kind, 8, 8) for i, kind in enumerate(kinds)]
    assert allocation_history.by_type(units) == {
        "up": [0, 1], "attn.output.dense": [2], "output.dense": [3], "2": [4],
    }  # fmt: skip


def test_location_shares_of_the_last_quarter(tmp_path):
    units = make_units(3, ("q", "v"))
    names = [unit["name"] for unit in units]
    early = {"ranks": dict.fromkeys(names, 8), "locations": dict.fromkeys(names, "minor")}
    # The last quarter is steps 6 to 8: the first of these holds one step of it, the second another.
    late = [
        {"ranks": dict(zip(names, ranks)), "locations": dict.fromkeys(names, location)}
        for ranks, location in [([2, 2, 4, 0, 0, 0], "medium"), ([2, 2, 2, 8, 0, 0], "primary")]
    ]
    decisions = [{"step": s, **d} for s, d in zip((0, 5, 7), (early, *late))]
    allocation = read_run(write_run(tmp_path / "a", "lelora", units, decisions)).allocation
    by_type = allocation_history.by_type(allocation.units)
    shares = allocation_history.location_shares(allocation, by_type)
    assert np.allclose(shares, [[1 / 2, 1 / 2, 0], [2 / 3, 1 / 3, 0]])
    figure = allocation_plots.draw_locations(allocation, "run")
    types, thirds = (
        np.array([[bar.get_width() for bar in bars] for bars in axes.containers]).T
        for axes in figure.axes
    )
    assert np.allclose(types, shares) and np.allclose(types.sum(axis=1), 1)
    assert np.allclose(thirds, [[1 / 2, 1 / 2, 0], [2 / 3, 1 / 3, 0], [0, 0, 0]])
    assert [text.get_text() for text in figure.axes[1].texts] == ["rank 0 throughout"]


def test_omega_bars_and_lines(tmp_path):
    units = make_units(2, ("q", "v"))
    names = [unit["name"] for unit in units]
    omega = [[1, 1, 1, 1], [1.5, 0.75, 0, 0], [1.25, 0, -0.5, 2]]
    decisions = [{"step": s, "omega": dict(zip(names, w))} for s, w in enumerate(omega)]
    decisions[-1] |= {"survivors": [names[0], names[3]]}
    allocation = read_run(write_run(tmp_path / "a", "weightlora", units, decisions)).allocation
    top, bottom = allocation_plots.draw_scores(
        allocation, METHODS["weightlora"].figures[0], "run"
    ).axes
    bars = {
        c.get_label(): {b.get_x() + b.get_width() / 2: b.get_height() for b in c}
        for c in top.containers
    }
    assert bars["survivor"] == pytest.approx({0: 0.25, 3: 1})
    assert bars["removed"] == pytest.approx({2: -1.5})
    ticks = next(line for line in top.get_lines() if line.get_label() == "removed, ω = 0")
    assert ticks.get_xdata().tolist() == [1]
    lines = [line.get_ydata() for line in bottom.get_lines() if len(line.get_xdata()) == 3]
    removed, kept = [(0, -0.25, np.nan), (0, np.nan, -1.5)], [(0, 0.5, 0.25), (0, np.nan, 1)]
    assert np.allclose(lines, removed + kept, equal_nan=True)


def test_units_outside_the_blocks_only(tmp_path):
    units = make_units(0, other=("head.dense", "head.out"))
    decisions = [{"step": 0, "ranks": {"all": 2}, "locations": {"all": "minor"}}]
    run = read_run(write_run(tmp_path / "a", "lelora", units, decisions))
    for _, figure in reports.run_figures(run):
        check_figure(figure)
        figure.savefig(tmp_path / "a.png")


def test_policy_and_budget_draw_what_was_logged(tmp_path):
    metrics = [
        {"step": s, "method/reward": -float(s), "method/baseline": None if s == 1 else -0.5,
         "method/entropy_rank": 1.0, "method/budget": 8 * s, "method/mean_rank": s}
        for s in (1, 2, 3)
    ]  # fmt: skip
    run = read_run(write_run(tmp_path / "a", "lelora", metrics=metrics))
    reward, entropy = reports.draw_curves(run, METHODS["lelora"].figures[0]).axes
    drawn = {line.get_label(): list(zip(*line.get_data())) for line in reward.get_lines()}
    assert drawn == {"reward": [(1, -1), (2, -2), (3, -3)], "baseline": [(2, -0.5), (3, -0.5)]}
    assert entropy.get_ylabel() == "entropy (nats)"
    budget, mean = reports.draw_curves(run, BUDGET).axes
    assert budget.get_lines()[0].get_ydata().tolist() == [8, 16, 24]
    assert mean.get_lines()[0].get_ydata().tolist() == [1, 2, 3]


def scored(folder, seed, parameters, rank=8, **scores):
    write_run(folder, "lora", seed=seed, steps=2, rank=rank)
    lines = [{"step": s, "loss": 1.0, "active_parameters": p} for s, p in enumerate(parameters, 1)]
    write_lines(folder / "metrics.jsonl", [*lines, {"step": 2, "eval_loss": 1.0, **scores}])
    return folder


def test_accuracy_against_parameters_puts_seeds_together(tmp_path):
    folders = [
        scored(tmp_path / f"a-s{i}", i, [1000, 3000], eval_accuracy=0.8 + 0.1 * i) for i in range(3)
    ]
    folders.append(scored(tmp_path / "b", 0, [50, 50], rank=4, eval_accuracy=0.7))
    (name, figure), = reports.comparisons([read_run(folder) for folder in folders])  # fmt: skip
    assert name == "accuracy_vs_parameters"
    check_figure(figure)
    (axes,) = figure.axes
    points = {
        c.get_label(): (*c.lines[0].get_xdata(), *c.lines[0].get_ydata()) for c in axes.containers
    }
    assert points == {"a (3 seeds)": pytest.approx((2000, 0.9)), "b": pytest.approx((50, 0.7))}
    _, error = axes.containers[0].lines[2]
    assert np.ptp(error.get_segments()[0][:, 1]) == pytest.approx(0.2)  # ± one standard deviation
    assert axes.get_xscale() == "log" and "accuracy" in axes.get_ylabel()
    written = report(folders, tmp_path / "out")
    assert [file.stem for file in written] == ["loss", "accuracy_vs_parameters"]
    check_images(tmp_path / "out", ["loss", "accuracy_vs_parameters"])


@pytest.mark.parametrize(
    "scores, label",
    [
        ([{"eval_matthews": 0.5}, {"eval_matthews": 0.6}], "Matthews"),
        ([{"eval_pearson": 0.5}, {"eval_pearson": 0.6, "eval_accuracy": 0.1}], "Pearson"),
        ([{}, {"eval_accuracy": 0.6}], "loss"),
    ],
)
def test_runs_are_compared_by_a_score_that_they_share(scores, label, tmp_path):
    folders = [scored(tmp_path / str(i), i, [10], **s) for i, s in enumerate(scores)]
    (_, figure), = reports.comparisons([read_run(folder) for folder in folders])  # fmt: skip
    assert label in figure.axes[0].get_ylabel()


def test_jaccard_and_stability(tmp_path):
    a, b = frozenset("abcd"), frozenset("cdef")
    assert jaccard(a, b) == pytest.approx(2 / 6) and jaccard(a, a) == 1
    assert jaccard(a, frozenset()) == 0 and jaccard(frozenset(), frozenset()) == 1
    units = make_units(2, ("q", "k", "v"))
    names = [unit["name"] for unit in units]
    folders = [
        write_run(tmp_path / f"s{i}", "weightlora", units, [{"step": 1, "survivors": kept}], seed=i)
        for i, kept in enumerate([names[:3], names[1:4], names[3:]])
    ]
    folders.append(write_run(tmp_path / "undecided", "lora", units))
    runs = [read_run(folder) for folder in folders]
    assert survivors(runs[0]) == frozenset(names[:3]) and survivors(runs[3]) is None
    figure = dict(reports.comparisons(runs))["stability"]
    check_figure(figure)
    expected = [[1, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 1]]
    assert np.allclose(figure.axes[0].images[0].get_array(), expected)
    report(folders, tmp_path / "out")
    check_images(tmp_path / "out", ["loss", "accuracy_vs_parameters", "stability"])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [read_run(write_run(tmp_path / parent / "run", "lora")) for parent in ("a", "b")]
    assert [run.name for run in reports._with_unique_names(runs)] == ["a/run", "b/run"]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    folder = realistic(tmp_path / "a", "lelora")
    whole = read_run(folder)
    for file in ("metrics.jsonl", "allocation.jsonl"):
        text = (folder / file).read_text().rstrip("\n")
        (folder / file).write_text(text[:-10])
    cut = read_run(folder)
    assert len(cut.metrics) == len(whole.metrics) - 1
    assert len(cut.allocation.ranks.steps) == len(whole.allocation.ranks.steps) - 1
    assert [name for name, _ in reports.run_figures(cut)] == FIGURES["lelora"][1:]


UNIT = json.dumps(make_units(1, ("q",)))
BROKEN = {
    "config.yaml: not a mapping": ("config.yaml", "hello", "config.yaml: no section"),
    "config.yaml: no YAML": ("config.yaml", "run: [", "config.yaml line"),
    "metrics.jsonl: no JSON": ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl line 2"),
    "metrics.jsonl: no object": ("metrics.jsonl", "1\n", "metrics.jsonl line 1"),
    "allocation.jsonl: no step": ("allocation.jsonl", '{"ranks": {}}\n', "allocation.jsonl line 1"),
    "allocation.jsonl: unknown unit": ("allocation.jsonl", '{"step": 0, "ranks": {"x": 1}}\n', "x in ranks"),
    "allocation.jsonl: wrong type": ("allocation.jsonl", '{"step": 0, "ranks": 8}\n', "line 1"),
    "allocation.jsonl: no number": ("allocation.jsonl", '{"step": 0, "ranks": {"all": "x"}}\n', "line 1"),
    "allocation.jsonl: location": ("allocation.jsonl", '{"step": 0, "locations": {"all": "x"}}\n', "line 1"),
    "units.json: cut": ("units.json", UNIT[:-5], "units.json: not a list of units"),
    "units.json: keys": ("units.json", '[{"name": "a"}]', "units.json: not a list of units"),
    "units.json: empty": ("units.json", "[]", "units.json: no unit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named(case, tmp_path):
    file, text, message = BROKEN[case]
    folder = realistic(tmp_path / "run", "lelora")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=message):
        report([folder])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no config\.yaml"):
        report([tmp_path])
    folder = realistic(tmp_path / "run", "lelora")
    with pytest.raises(UserError, match=r"--out .*cannot be written"):
        report([folder], folder / "config.yaml")
    (folder / "units.json").unlink()
    with pytest.raises(UserError, match=r"units\.json: No such file"):
        report([folder])
    (folder / "allocation.jsonl").unlink()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="nothing logged yet"):
        report([folder])


def test_command(root, tmp_path, monkeypatch, capsys):
    folders = [write_run(tmp_path / name, "lora") for name in ("a", "b")]
    script = str(root / "launch/report.py")
    monkeypatch.setattr(os, "_exit", sys.exit)  # what a failure ends in; this process goes on
    monkeypatch.setattr(sys, "argv", [script, str(folders[0])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    drawn = [str(folders[0] / "figures" / name) for name in ("loss.png", "optimizer.png")]
    assert capsys.readouterr().out.split() == drawn
    monkeypatch.setattr(sys, "argv", [script, *map(str, folders)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    refused = "error: --out: not given with 2 runs; accepted: a folder\n"
    assert capsys.readouterr() == ("", refused)
