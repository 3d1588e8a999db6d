"""`trainer.finetune`: what was in memory, what comes back, what ends a run."""

import json
import subprocess
import sys

import datasets
import pandas
import pytest

import trainer
from tests.helpers import QUICKSTART, ROOT, TINY, error_lines, losses, python, sample
from trainer.api.memory_source import sources_of
from trainer.config.config import load_config
from trainer.config.yaml import parse_yaml
from trainer.records.callbacks import EVENTS, UserCallbacks
from trainer.records.jsonl import read_metrics

ROWS = [
    json.loads(line)
    for line in (ROOT / "configs/quickstart/train.jsonl").read_text().splitlines()[:48]
]


def sections(folder, **run):
    """The sections of a small run as a dictionary."""
    return {
        "run": {"name": "here", "dir": str(folder), "steps": 3, "verify": "off", **run},
        "model": {"id": str(TINY)},
        "data": {
            "prompt": "{question}\n", "completion": "answer", "batch_size": 8,
            "cache": str(folder / "cache"),
        },
        "method": {"kind": "dylora"},
        "log": {"every": 1, "progress": "none", "tensorboard": False},
    }  # fmt: skip


class Seen(trainer.Callback):
    """Notes what it is told."""

    def __init__(self):
        self.events, self.losses, self.result = [], [], None

    def on_step(self, step):
        self.events.append(f"step {step.step}")
        self.losses.append(step.loss)
        assert step.logged is not None and step.logged["loss"] == step.loss

    def on_decision(self, step, decision):
        self.events.append(f"decision {step}")
        assert decision.ranks or decision.extra

    def on_eval(self, evaluation):
        self.events.append(f"eval {evaluation.step}")

    def on_save(self, step, folder):
        self.events.append(f"save {step}")
        assert (folder / "manifest.json").is_file()

    def on_end(self, result):
        self.result = result


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, what a callback was told, the result) of a run on records in memory."""
    folder, seen = tmp_path_factory.mktemp("api"), Seen()
    given = sections(folder, eval_every=2)
    given["checkpoint"] = {"every": 2, "asynchronous": False}
    result = trainer.finetune(given, train=ROWS, eval=ROWS[:8], callbacks=[seen])
    return folder, seen, result


def as_lines(table):
    """A table as dictionaries, without what is not there."""
    return [
        {name: value for name, value in row.items() if not pandas.isna(value)}
        for row in table.astype(object).to_dict("records")
    ]


def test_the_result_has_what_the_run_folder_has(ran):
    folder, seen, result = ran
    lines = read_metrics(folder / "here/metrics.jsonl")
    table = result.metrics
    assert isinstance(table, pandas.DataFrame) and len(table) == len(lines)
    for column in table:
        found = [None if pandas.isna(value) else value for value in table[column]]
        assert found == [line.get(column) for line in lines], column
    evaluated = [line for line in lines if "eval_loss" in line]
    assert as_lines(result.training) == [line for line in lines if "eval_loss" not in line]
    assert as_lines(result.evaluations) == evaluated and len(evaluated) == 2
    assert result.scores == {k: v for k, v in evaluated[-1].items() if k.startswith("eval_")}
    assert result.scores and result.step == 3
    assert [path.name for path in result.checkpoints] == ["step-00000002", "step-00000003"]
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert list(result.decisions["step"]) == [0, 1, 2]
    assert len(result.answers) == len(result.losses) == 0 and result.best_checkpoint is None
    assert result.config == parse_yaml((folder / "here/config.yaml").read_text(), "it")
    assert seen.result == result and "3 steps, eval_loss" in str(result)
    # DyLoRA decides one rank for all units.
    drawn = dict(enumerate(one["all"] for one in result.decisions["ranks"]))
    units = json.loads((folder / "here/units.json").read_text())
    assert list(result.units["name"]) == [unit["name"] for unit in units]
    assert as_lines(result.ranks[["step", "unit", "rank"]]) == [
        {"step": step, "unit": unit["name"], "rank": drawn[step]}
        for step in drawn for unit in units
    ]  # fmt: skip


READ = {
    "adapter": "adapter", "allocation.jsonl": "decisions", "checkpoints": "checkpoints",
    "config.yaml": "config", "figures": "figures", "heartbeat.json": "status",
    "losses.jsonl": "losses", "metrics.jsonl": "metrics", "predictions.jsonl": "answers",
    "README.md": "readme", "units.json": "units",
}  # fmt: skip
"""What of `Result` gives a file or folder of a run."""
INTERNAL = {"initial.safetensors", "initial.sha256", "trackers.json", ".lock", "from_memory"}
"""What only a resume or an export needs."""


def test_there_is_no_file_that_the_result_does_not_read(tmp_path):
    """A run that writes all of them: singular parts of W, answers, losses, the best checkpoint."""
    given = sections(tmp_path, eval_every=1, keep_best="eval_loss")
    given["method"] = {"kind": "lelora", "rank": 4}
    given["generation"] = {"records": 3, "max_new_tokens": 4}
    given["log"] |= {"record_losses": True}
    given["checkpoint"] = {"keep": 1}
    given["optim"] = {"learning_rate": 1.0}  # worse from step to step
    folder = tmp_path / "here"
    result = trainer.finetune(given, train=ROWS, eval=ROWS[:8])
    there = {path.name for path in folder.iterdir()}
    assert set(READ) <= there and there - set(READ) <= INTERNAL
    for name in ("answers", "losses"):
        file = folder / {"answers": "predictions.jsonl", "losses": "losses.jsonl"}[name]
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert as_lines(getattr(result, name)) == rows and rows, name
    assert result.status == json.loads((folder / "heartbeat.json").read_text())
    assert result.status["state"] == "done" and result.readme.startswith("# here\n")
    best = min(as_lines(result.evaluations), key=lambda line: line["eval_loss"])
    assert result.scores["eval_loss"] == best["eval_loss"] and best["step"] == 1
    assert result.best_checkpoint.name == "step-00000001" == result.checkpoints[0].name
    decisions = [json.loads(x) for x in (folder / "allocation.jsonl").read_text().splitlines()]
    decided = {
        (line["step"], unit, rank, line["locations"][unit] if rank else None)
        for line in decisions if line.get("ranks") for unit, rank in line["ranks"].items()
    }  # fmt: skip
    columns = ("step", "unit", "rank", "location")
    rows = result.ranks[list(columns)].astype(object).where(result.ranks.notna(), None)
    assert set(rows.itertuples(index=False, name=None)) == decided and decided
    page = result.report()
    assert page == folder / "report.html" and "<img" in page.read_text()


def test_ranks_of_a_run_that_decides_nothing(tmp_path):
    """Every unit's rank, from the beginning on; of a run that trains all of the model, none."""
    (tmp_path / "config.yaml").write_text("method: {kind: lora, rank: 4}")
    units = [{"name": f"u{i}", "layer": i, "kind": "u", "out_features": 8, "in_features": 6}
             for i in range(2)]  # fmt: skip
    (tmp_path / "units.json").write_text(json.dumps(units))
    result = trainer.Result(tmp_path)
    assert [tuple(row) for row in result.ranks.to_numpy()] == [
        (0, "u0", 0, "u", 4), (0, "u1", 1, "u", 4)
    ]  # fmt: skip
    given = "method: {kind: lora, rank: 4, start_options: {ranks: redistributed}}"
    (tmp_path / "config.yaml").write_text(given)
    assert len(result.ranks) == 0  # 4 is no matrix's: those that the start gave are not recorded
    (tmp_path / "config.yaml").write_text("method: {kind: full}")
    assert len(result.ranks) == 0 and not result.status and not result.readme


def test_callbacks_are_told_in_order(ran):
    assert ran[1].events == [
        "decision 0", "step 1", "decision 1", "step 2", "eval 2", "save 2",
        "decision 2", "step 3", "eval 3", "save 3",
    ]  # fmt: skip
    assert ran[1].losses == losses(ran[0] / "here")


def test_a_finished_run_returns_at_once(ran):
    folder, _, result = ran
    given = sections(folder, eval_every=2)
    given["checkpoint"] = {"every": 2, "asynchronous": False}
    seen, before = Seen(), (folder / "here/metrics.jsonl").read_text()
    assert trainer.finetune(given, train=ROWS, eval=ROWS[:8], callbacks=[seen]) == result
    assert (folder / "here/metrics.jsonl").read_text() == before
    assert not [event for event in seen.events if event.startswith("step")]


def test_records_are_the_same_from_a_list_a_frame_a_dataset_and_a_file(ran, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sources = {
        "frame": pandas.DataFrame(ROWS), "dataset": datasets.Dataset.from_list(ROWS),
        "path": file,
    }  # fmt: skip
    for name, train in sources.items():
        trainer.finetune(sections(tmp_path, name=name), train=train)
        assert losses(tmp_path / name) == losses(ran[0] / "here"), name


def test_a_yaml_file_with_overrides(tmp_path):
    result = trainer.finetune(
        QUICKSTART, train=ROWS, eval={"a": ROWS[:4], "b": ROWS[4:8]},
        overrides=[
            f"run.dir={tmp_path}", f"data.cache={tmp_path}/cache", "run.steps=1", "run.verify=off",
            "engine.kind=single", "log.progress=none", "log.tensorboard=false",
            "run.eval_every=0", "run.eval_at_start=false", "model.quantization=none",
        ],
    )  # fmt: skip
    assert result.folder == tmp_path / "quickstart"
    assert {"eval_loss", "eval_a_loss", "eval_b_loss"} <= result.scores.keys()


def test_a_path_in_memory_is_its_content(tmp_path):
    one, again = (sources_of(list(rows), "train", tmp_path) for rows in (ROWS, tuple(ROWS)))
    assert one == again != sources_of(ROWS[1:], "train", tmp_path)
    assert sources_of(0.1, "eval", tmp_path) == 0.1
    assert sources_of({"a": "x.jsonl"}, "eval", tmp_path) == {"a": "x.jsonl"}


@pytest.mark.parametrize(("train", "said"), [
    ([], "train: no records; accepted: at least one"),
    (pandas.DataFrame({"a": []}), "train: no records"),
    ([{"a": 1}, 7], "train: record 2 is a int; accepted: a datasets.Dataset, a pandas.DataFrame"),
    ([{"a": {1}}], "train: record 1: Object of type set is not JSON serializable; accepted: texts"),
    ([{"a": float("nan")}], "train: record 1: Out of range float values"),
    (datasets.DatasetDict({"x": datasets.Dataset.from_list(ROWS)}), "one of its splits: x"),
    (pandas.DataFrame({"a": [1, "x"]}), "accepted: columns of one type each"),
    ({"a": "b"}, "train: dict given; accepted: a datasets.Dataset"),
])  # fmt: skip
def test_records_that_cannot_be_used(train, said, tmp_path):
    with pytest.raises(trainer.UserError) as raised:
        trainer.finetune(sections(tmp_path), train=train)
    assert said in str(raised.value)


@pytest.mark.parametrize(("config", "said"), [
    (7, "config: int given; accepted: the path of a YAML file"),
    ({"model": {"id": "m"}}, "run.name: missing"),
    ({"modle": {}}, "modle: unknown key"),
    ("nowhere.yaml", "--config nowhere.yaml: No such file"),
])  # fmt: skip
def test_configurations_that_cannot_be_used(config, said, tmp_path):
    with pytest.raises(trainer.UserError) as raised:
        trainer.finetune(config, train="t.jsonl")
    assert said in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_an_error_has_the_sentence_of_the_command(tmp_path):
    overrides = ["model.id=nowhere", f"run.dir={tmp_path}", "engine.kind=single"]
    with pytest.raises(trainer.UserError) as raised:
        trainer.finetune(QUICKSTART, overrides=overrides)
    code, _, err = python("launch/train.py", "--config", QUICKSTART, *overrides)
    assert code == 2 and error_lines(err) == [f"error: {raised.value}"]


class Raises:
    """Raises at one event."""

    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, *_):
        raise KeyError("mine")


@pytest.mark.parametrize("event", sample(EVENTS, "on_step", "on_save", "on_end"))
def test_a_callback_that_raises_ends_the_run_saved(event, tmp_path):
    given = sections(tmp_path, eval_every=1)
    given["checkpoint"] = {"every": 1, "asynchronous": False}
    with pytest.raises(trainer.RunFailed) as raised:
        trainer.finetune(given, train=ROWS, eval=ROWS[:4], callbacks=[Raises(event)])
    assert f"callbacks: Raises.{event} raised KeyError at step" in str(raised.value)
    assert isinstance(raised.value.__cause__, KeyError)
    state = json.loads((tmp_path / "here/heartbeat.json").read_text())
    assert state["state"] == "failed"
    saved = len(list((tmp_path / "here/checkpoints").glob("step-*")))
    assert saved == {"on_end": 3, "on_save": 2}.get(event, 1)
    result = trainer.finetune(given, train=ROWS, eval=ROWS[:4])  # and goes on without it
    assert result.step == 3 and losses(result.folder)


def test_an_object_without_any_method_is_refused(tmp_path):
    with pytest.raises(trainer.UserError, match=r"callbacks: .*Seen.* accepted: objects with one"):
        trainer.finetune(sections(tmp_path), train=ROWS, callbacks=[type("Seen", (), {})()])


SCRIPT = """
import json, sys
import trainer
class Mine:
    def on_step(self, step):
        assert step.step < 2, "enough"
given, rows = json.loads(sys.argv[1]), json.loads(sys.argv[2])
trainer.finetune(given, train=rows, callbacks=[Mine()])
print("NOT REACHED")
"""


def test_a_callback_that_raises_ends_all_ranks(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = json.dumps(sections(tmp_path))
    code, out, err = python(script, given, json.dumps(ROWS), processes=2)
    assert code == 1 and "NOT REACHED" not in out
    (line,) = error_lines(err)
    assert line.startswith("error: callbacks: Mine.on_step raised AssertionError at step 2: enough")


def test_a_callback_that_exits_has_raised():
    class Exits:
        def on_step(self, step):
            sys.exit("enough")

    users = UserCallbacks([Exits()])
    users.on_step(trainer.StepRecord(2, 1.0, 1.0, 1.0, 0.0, False, None))
    assert "Exits.on_step raised SystemExit at step 2: enough" in str(users.failure)


def test_a_mistake_under_a_launcher_is_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = json.dumps(sections(tmp_path) | {"method": {"kind": "lorra"}})
    code, out, err = python(script, given, json.dumps(ROWS), processes=2)
    assert code == 2 and "NOT REACHED" not in out
    (line,) = error_lines(err)
    assert line.startswith("error: method.kind: 'lorra' given; accepted: lora")


def test_importing_it_is_cheap():
    program = (
        "import sys, trainer; trainer.__version__, dir(trainer);"
        "heavy = {'torch', 'pydantic', 'yaml', 'numpy', 'tqdm'} & set(sys.modules);"
        "assert not heavy, heavy; trainer.Config; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(trainer._API) <= set(dir(trainer)) and trainer.load_config is load_config
    with pytest.raises(AttributeError):
        trainer.nothing
    for name in trainer._API:
        assert getattr(trainer, name).__module__ == trainer._API[name]
