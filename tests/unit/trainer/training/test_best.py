"""Keeping the best checkpoint, early stopping, several evaluation sets, answers by record."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.evaluate import main as evaluate_main
from tests.helpers import ROOT, quick_config, sample
from trainer.checkpoint import store
from trainer.checkpoint.compatibility import check_options
from trainer.checkpoint.saved import read_saved
from trainer.config.config import load_config, with_overrides
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.export.export import export_run
from trainer.records.jsonl import final_scores, read_metrics
from trainer.run.run import run
from trainer.session import open_session
from trainer.training import loop
from trainer.training.evaluation import Evaluation, _named, evaluate, full_evaluation
from trainer.training.stop_request import Interrupted, StopRequest

EVAL = ROOT / "configs/quickstart/eval.jsonl"


def config(tmp, *more):
    return quick_config(
        tmp, "run.steps=8", "run.eval_every=1", "method.kind=lora", "method.rank=2",
        "method.targets=[q_proj]", "run.keep_best=eval_loss", "checkpoint.keep=1", *more,
    )  # fmt: skip


@pytest.fixture
def scored(monkeypatch):
    """Evaluations give scores of a list, one a step, instead of the model's own."""

    def with_scores(scores, metric="eval_loss"):
        def evaluation(session):
            step = scored_step(session)
            return Evaluation({"eval_loss": 1.0, metric: scores[step - 1]}, [], [], 0.0, 0.0)

        monkeypatch.setattr(loop, "full_evaluation", evaluation)

    steps = []
    honest = loop.train_step

    def train_step(training, step, **rest):
        steps[:] = [step + 1]
        return honest(training, step, **rest)

    def scored_step(session):
        return steps[0]

    monkeypatch.setattr(loop, "train_step", train_step)
    return with_scores


def adapter(folder: Path) -> dict:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def kept(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in store.complete(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("eval_loss", [5.0, 2.0, 4.0, 2.0, float("nan")], 2),
        ("eval_perplexity", [float("nan"), 3.0, 4.0, 3.5, 3.2], 2),
    ],
)
def test_the_best_checkpoint_is_kept_and_exported(metric, scores, best, tmp_path, scored, capsys):
    """Of equal ones the first; what is not finite is never the best."""
    scored(scores, metric)
    settings = config(tmp_path, f"run.keep_best={metric}", "run.steps=5", "log.progress=plain")
    run(settings, World())
    folder = settings.run_folder
    assert kept(folder) == [best, 5]
    checkpoint = folder / f"checkpoints/step-{best:08d}"
    out = export_run(checkpoint, tmp_path / "out", World())
    last = export_run(folder / "checkpoints/step-00000005", tmp_path / "last", World())
    assert same(adapter(folder / "adapter"), adapter(tmp_path / "out"))
    assert not same(adapter(folder / "adapter"), adapter(tmp_path / "last"))
    said = f"step {best}, the best by {metric} ({scores[best - 1]:.6g})"
    assert said in out and "step 5, " in last and said not in last
    for text in ("README.md", "adapter/README.md"):
        assert said in (folder / text).read_text()
    printed = capsys.readouterr().out
    assert f"({said})" in printed
    assert f"{metric} {scores[best - 1]:.4g}" in printed.splitlines()[-3]
    assert read_saved(folder).checkpoint == checkpoint


def test_a_score_that_is_never_finite_is_told(tmp_path, scored, capsys):
    """It keeps no checkpoint, and the last one is exported: said at each evaluation and at the
    end."""
    scored([float("nan")] * 4)
    settings = config(tmp_path, "run.steps=4", "run.patience=9", "log.progress=plain")
    run(settings, World())
    printed = capsys.readouterr().out
    assert (
        printed.count(": eval_loss is not finite, so that this evaluation cannot be the best") == 4
    )
    said = "step 4, since eval_loss was finite in no evaluation: run.keep_best had no effect"
    assert f"({said})" in printed and said in (settings.run_folder / "README.md").read_text()
    assert kept(settings.run_folder) == [4]


@pytest.mark.parametrize(
    ("task", "metric", "best"),
    [("multiple_choice", "eval_accuracy", "max"), ("multiple_choice", "eval_accuracy_norm", "max"),
     ("causal_lm", "eval_loss", "min"), ("multiple_choice", "eval_perplexity", "min"),
     ("sequence_classification", "eval_matthews", "max"),
     ("sequence_classification", "eval_f1", "max")],
)  # fmt: skip
def test_every_metric_has_its_direction(task, metric, best, tmp_path):
    settings = config(
        tmp_path, f"task.kind={task}", "data.format=auto", "data.packing=false",
        f"run.keep_best={metric}", f"data.eval={{a: {EVAL}, b-2: {EVAL}}}",
    )  # fmt: skip
    name = metric.removeprefix("eval_")
    assert {settings.metrics[f"eval_{one}{name}"] for one in ("", "a_", "b-2_")} == {best}


def test_every_score_of_a_task_that_is_no_interval_can_be_kept(tmp_path):
    session = open_session(config(tmp_path), World())
    assert evaluate(session).keys() == session.config.metrics.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run.keep_best=loss"], r"run\.keep_best: 'loss' given; accepted: eval_loss, eval_perp"),
        (["run.keep_best=eval_accuracy"], r"accepted: eval_loss, eval_perplexity"),
        (["run.eval_every=0"], r"run\.keep_best: eval_loss given without data\.eval and run"),
        (["run.keep_best=null", "run.patience=2"], r"run\.patience: 2 given without run\.keep_be"),
        (["run.patience=0"], r"run\.patience: 0 given"),
        (["data.eval={}"], r"data\.eval: \{\} given; accepted: at least one source"),
        (["data.eval={a b: x}"], r"data\.eval: 'a b' given as a name; accepted: letters"),
        (["data.eval={a: left_out}"], r"data\.eval\.a: 'left_out' given; accepted: a source"),
        (["data.eval={a: 3}"], r"data\.eval: .* given; accepted: "),
    ],
)
def test_what_cannot_be_kept_is_refused(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        config(tmp_path, *given)


def test_patience_ends_the_run_and_its_end_is_final(tmp_path, scored, capsys):
    scored([5.0, 4.0, 4.5, 4.0, 3.0, 2.0, 1.0, 0.0])
    settings = config(tmp_path, "run.patience=2", "log.progress=plain")
    run(settings, World())
    folder = settings.run_folder
    assert kept(folder) == [2, 4]
    assert "no better eval_loss in 2 evaluations (run.patience)" in capsys.readouterr().out
    before = adapter(folder / "adapter")
    run(settings, World())  # is completed again, and trains nothing
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 4
    assert same(before, adapter(folder / "adapter"))
    with pytest.raises(UserError, match=r"has made all of its 4 steps, so .*learning_rate"):
        run(config(tmp_path, "run.patience=2", "optim.learning_rate=1"), World())
    run(config(tmp_path, "run.steps=5", "run.patience=3"), World())  # goes on
    assert kept(folder) == [5]


class After(StopRequest):
    """Asks to stop when it was asked so many times: once at the start, then in every step before
    its evaluation and after it."""

    def __init__(self, options, times):
        super().__init__(options)
        self._left = times

    @property
    def reason(self):
        self._left -= 1
        return "asked" if self._left < 0 else None


def lines(folder: Path) -> list[dict]:
    found = read_metrics(folder / "metrics.jsonl")
    times = ("seconds", "per_second", "memory")
    return [{k: v for k, v in line.items() if not any(t in k for t in times)} for line in found]


@pytest.mark.parametrize("times", sample([1, 2, 3, 4, 5], 1, 4))
def test_an_interrupted_run_keeps_the_best_and_its_patience(times, tmp_path, scored):
    """Stopped before an evaluation, which is then made up for, and after one; again and again."""
    scored([5.0, 2.0, 4.0, 2.5, 1.0, 0.0])
    whole = config(tmp_path, "run.name=whole", "run.patience=2")
    run(whole, World())
    cut = config(tmp_path, "run.name=cut", "run.patience=2")
    for stops in range(9):
        try:
            run(cut, World(), After(cut.run, times))
            break
        except Interrupted:
            continue
    assert stops == {1: 4, 2: 3, 3: 2, 4: 1, 5: 1}[times]
    assert lines(cut.run_folder) == lines(whole.run_folder)
    assert kept(cut.run_folder) == kept(whole.run_folder) == [2, 4]
    assert same(adapter(cut.run_folder / "adapter"), adapter(whole.run_folder / "adapter"))


def test_other_records_or_another_metric_cannot_go_on(tmp_path):
    run(config(tmp_path, "run.steps=2"), World())
    with pytest.raises(UserError, match=r"run\.keep_best: 'eval_perplexity' given, but"):
        run(config(tmp_path, "run.steps=4", "run.keep_best=eval_perplexity"), World())
    with pytest.raises(UserError, match=r"data\.eval: does not hold the records by which"):
        run(config(tmp_path, "run.steps=4", "data.eval_records=8"), World())
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(EVAL.read_bytes())
    run(config(tmp_path, "run.steps=4", f"data.eval={moved}"), World())


def test_several_sets_are_scored_each_and_on_average(tmp_path):
    rows = EVAL.read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(rows[:5]))
    (tmp_path / "two.jsonl").write_text("".join(rows[5:16]))
    parts = {"one": f"{tmp_path}/one.jsonl", "two": [f"{tmp_path}/two.jsonl"]}
    base = ["run.keep_best=null", "data.eval_records=null"]
    alone = {
        name: evaluate(open_session(config(tmp_path, *base, f"data.eval={json.dumps(source)}"), World()))
        for name, source in parts.items()
    }  # fmt: skip
    several = config(tmp_path, *base, f"data.eval={json.dumps(parts)}")
    found = full_evaluation(open_session(several, World())).scores
    for name, scores in alone.items():
        assert (
            scores.items()
            == {
                key.replace(f"{name}_", ""): v for key, v in found.items() if f"_{name}_" in key
            }.items()
        )
    assert found["eval_loss"] == sum(s["eval_loss"] for s in alone.values()) / 2
    assert len(found) == 6
    (tmp_path / "config.yaml").write_text(several.to_yaml())
    assert load_config(tmp_path / "config.yaml") == several


def test_what_only_one_of_several_sets_gives_has_no_mean():
    """SQuAD 2.0 beside a set in which every question has an answer."""
    whole = {"loss": 1.0, "f1": 60.0, "has_answer_f1": 70.0, "no_answer_f1": 50.0}
    answered = {"loss": 3.0, "f1": 80.0, "has_answer_f1": 80.0}
    for order in (("a", "b"), ("b", "a")):
        sets = {"a": whole, "b": answered}
        found = _named({name: sets[name] for name in order})
        means = {k: v for k, v in found.items() if k[5:7] not in ("a_", "b_")}
        assert means == {"eval_loss": 2.0, "eval_f1": 70.0, "eval_has_answer_f1": 75.0}
        assert len(found) == 3 + len(whole) + len(answered)


def test_scores_of_other_answers_are_not_compared_with_the_best(tmp_path):
    """The rest of `generation` says how fast and how much is shown."""
    settings = config(
        tmp_path, "run.keep_best=eval_ended", "generation.records=2", "generation.max_new_tokens=3"
    )
    state = {"config": settings.model_dump(mode="json")}
    check_options(with_overrides(settings, ["generation.shown=1"]), tmp_path, state)
    longer = with_overrides(settings, ["generation.max_new_tokens=4"])
    with pytest.raises(BadCheckpoint, match=r"generation\.max_new_tokens: 4 given, but .* with 3"):
        check_options(longer, tmp_path, state)
    by_loss = {
        "config": with_overrides(settings, ["run.keep_best=eval_loss"]).model_dump(mode="json")
    }
    check_options(with_overrides(longer, ["run.keep_best=eval_loss"]), tmp_path, by_loss)


def test_labels_that_are_not_the_checkpoints_are_refused(tmp_path):
    """Their numbers would mean others: the accuracy would be silently wrong."""
    for name, labels in (("t", "ab"), ("u", "bc")):
        texts = [{"text": f"{n} is it", "label": labels[n % 2]} for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    settings = config(
        tmp_path, "task.kind=sequence_classification", f"data.train={tmp_path}/t.jsonl",
        f"data.eval={tmp_path}/t.jsonl", "run.steps=1", "run.keep_best=null", "run.eval_every=0",
        "data.packing=false", "data.format=auto", "data.text=text",
    )  # fmt: skip
    run(settings, World())
    other = [f"data.train={tmp_path}/u.jsonl", f"data.eval={tmp_path}/u.jsonl"]
    with pytest.raises(UserError, match=r"u.jsonl has the labels b, c, but .* was made with a, b"):
        evaluate_main([str(settings.run_folder), *other])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_answers_are_those_of_what_is_exported(tmp_path):
    """Of the best evaluation, one a record and set; their scores' mean is the accuracy."""
    questions = [
        {"prompt": f"Question: {n}\nAnswer:", "choices": ["one", "2", "three"], "label": n % 3}
        for n in range(7)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions[:4]))
    settings = config(
        tmp_path, "task.kind=multiple_choice", f"data.train={tmp_path}/q.jsonl", "run.steps=3",
        f"data.eval={{q: {tmp_path}/q.jsonl, r: {tmp_path}/r.jsonl}}", "data.packing=false",
        "run.keep_best=eval_q_accuracy", "data.format=auto", "data.prompt=prompt",
    )  # fmt: skip
    run(settings, World())
    metrics = final_scores(read_metrics(settings.run_folder / "metrics.jsonl"))
    found = rows(settings.run_folder)
    assert {one["step"] for one in found} == {metrics["step"]}
    for name, count in (("q", 7), ("r", 4)):
        own = [one for one in found if one["set"] == name]
        assert [(one["id"], one["label"]) for one in own] == [(n, n % 3) for n in range(count)]
        for one in own:
            best = max(range(3), key=one["log_likelihoods"].__getitem__)
            assert (one["answer"], one["score"]) == (best, float(best == one["label"]))
        accuracy = sum(one["score"] for one in own) / count
        assert accuracy == pytest.approx(metrics[f"eval_{name}_accuracy"], abs=1e-12)
    again = tmp_path / "again.jsonl"
    assert evaluate_main([str(settings.run_folder), "--predictions", str(again)]) == 0
    kept_rows = [json.loads(line) for line in again.read_text().splitlines()]
    assert [one["answer"] for one in kept_rows] == [one["answer"] for one in found]


@pytest.mark.parametrize(
    ("changes", "score"),
    [(["data.label=label"], "accuracy"), (["data.label=size", "task.problem=regression"], "loss")],
)
def test_answers_of_a_classification(changes, score, tmp_path):
    texts = [{"text": f"{n} is it", "label": "ab"[n % 2], "size": n / 7} for n in range(12)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    settings = config(
        tmp_path, "task.kind=sequence_classification", f"data.train={tmp_path}/t.jsonl",
        f"data.eval={tmp_path}/t.jsonl", "run.steps=1", "run.keep_best=null", "run.eval_every=0",
        "data.packing=false", "data.format=auto", "data.text=text", *changes,
    )  # fmt: skip
    run(settings, World())
    found = rows(settings.run_folder)
    key = changes[0].partition("=")[2]
    expected = [one[key] if key == "label" else pytest.approx(one[key]) for one in texts]
    assert [one["label"] for one in found] == expected
    mean = sum(one["score"] for one in found) / 12
    metrics = read_metrics(settings.run_folder / "metrics.jsonl")[-1]
    assert mean == pytest.approx(metrics[f"eval_{score}"], rel=1e-5)


def test_a_task_without_answers_has_no_file(tmp_path):
    settings = config(tmp_path, "run.steps=1")
    run(settings, World())
    assert not (settings.run_folder / "predictions.jsonl").exists()
    with pytest.raises(UserError, match=r"--predictions: given, but task.kind=causal_lm"):
        evaluate_main([str(settings.run_folder), "--predictions", str(tmp_path / "x")])
    for flag in ("--limit", "--num-fewshot", "--batch-size"):
        with pytest.raises(UserError, match=f"{flag}: 3 given without --tasks, where it has no ef"):
            evaluate_main([str(settings.run_folder), flag, "3"])


def test_time_and_memory_are_printed(tmp_path, capsys):
    run(config(tmp_path, "run.steps=1", "log.progress=plain"), World())
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "eval_perplexity" in line)
    assert line.endswith(" GiB)  best so far") and " s, " in line


def test_a_bar_on_a_terminal(tmp_path, capsys):
    run(config(tmp_path, "run.steps=1", "log.progress=bar", f"data.eval={{mine: {EVAL}}}"), World())
    assert "evaluating mine" in capsys.readouterr().err
