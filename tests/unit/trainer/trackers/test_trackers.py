"""Trackers: mlflow and wandb hold what metrics.jsonl holds; one that fails changes nothing."""

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment, losses, quick_config
from tests.unit.trainer.trackers import offline
from trainer.config.trackers import TRACKERS
from trainer.distributed.world import World
from trainer.errors import RunFailed, UserError
from trainer.records.callbacks import StepRecord
from trainer.records.jsonl import read_metrics
from trainer.report.result import Result
from trainer.run.run import run
from trainer.trackers import backend as backends
from trainer.trackers import record as records
from trainer.trackers.backend import BACKENDS, MLflow
from trainer.trackers.record import TrackerRecord, Trackers

EVALUATED = ("run.eval_every=2", "run.steps=4")


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """(tag → step → value) of metrics.jsonl, under the trackers' names."""
    found: dict[str, dict[int, float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        group = "eval/" if "eval_loss" in line else "train/"
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                tag = name if "/" in name else group + name
                found.setdefault(tag, {})[line["step"]] = value
    return found


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def test_the_names_are_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(TRACKERS.values()) == set(BACKENDS) == set(LOGGER_TYPE_TO_CLASS)


@needs("mlflow")
def test_mlflow_holds_what_metrics_jsonl_holds(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    config = quick_config(tmp_path, "log.trackers=[mlflow]", "log.project=here", *EVALUATED)
    run(config, World())
    (found,) = mlflow.search_runs(experiment_names=["here"], output_format="list")
    client = mlflow.MlflowClient()
    expected = logged(config.run_folder)
    assert set(found.data.metrics) == set(expected)
    for tag, values in expected.items():
        history = client.get_metric_history(found.info.run_id, tag)
        assert {one.step: one.value for one in history} == values, tag
    assert found.data.params["method.kind"] == "lora"
    assert found.info.run_name == config.run.name and found.info.status == "FINISHED"


@needs("mlflow")
def test_a_resumed_run_goes_on_in_mlflows(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    given = ("log.trackers=[mlflow]", "log.project=here", "run.eval_every=2")
    for steps in (2, 4):
        config = quick_config(tmp_path, *given, f"run.steps={steps}")
        run(config, World())
    (found,) = mlflow.search_runs(experiment_names=["here"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    expected = logged(config.run_folder)["train/loss"]
    assert {one.step: one.value for one in history} == expected and max(expected) == 4
    assert found.info.status == "FINISHED"


@needs("wandb")
def test_wandb_holds_what_metrics_jsonl_holds(tmp_path, monkeypatch):
    """Resumed, in the same run of wandb."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = ("log.trackers=[wandb]", "run.eval_every=2")
    for steps in (2, 4):
        config = quick_config(tmp_path, *given, f"run.steps={steps}")
        run(config, World())
    files = sorted(config.run_folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name  # run-IDENTITY.wandb
    found = offline.wandb(config.run_folder, tmp_path)
    assert found == logged(config.run_folder) and max(found["train/loss"]) == 4


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=needs(TRACKERS[name])) for name in offline.READERS
])  # fmt: skip
def test_a_tracker_without_a_server_holds_what_metrics_jsonl_holds(name, tmp_path):
    """In a process of its own: they patch libraries, and write at its exit."""
    place = tmp_path / "place"
    program = f"""
from pathlib import Path
from tests.helpers import quick_config
from trainer.distributed.world import World
from trainer.run.run import run
run(quick_config(Path({str(tmp_path)!r}), "log.trackers=[{name}]", "log.project=here",
                 "log.progress=plain", "generation.records=2", "generation.max_new_tokens=3",
                 *{EVALUATED!r}), World())
"""
    place.mkdir()
    set_up = {
        "TRACKIO_DIR": place, "SWANLAB_MODE": "offline", "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": place, "CLEARML_OFFLINE_MODE": "1", "CLEARML_CACHE_DIR": place,
        "DVC_NO_ANALYTICS": "1", "HOME": place,
    }  # fmt: skip
    environ = environment() | {key: str(value) for key, value in set_up.items()}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "failed, the run goes on" not in done.stdout, done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert offline.READERS[name](folder, place) == logged(folder)


class Broken(MLflow):
    """Begins, then fails."""

    def __init__(self, *_):
        self.is_new = False

    identity = None

    def log(self, values, step):
        raise ConnectionError("no server")

    def finish(self, *, ended):
        raise SystemExit(3)


STEP = StepRecord(1, 2.0, 1e-3, 0.5, 0.1, False, {"step": 1, "loss": 2.0})


class Held(MLflow):
    """Notes how it was ended."""

    made: list = []
    identity = None

    def __init__(self, *_):
        self.is_new, self.ends, self.drawn = False, [], []
        self.made.append(self)

    def log(self, values, step): ...

    def answers(self, answers, step): ...

    def figure(self, name, figure, step):
        self.drawn.append(name)

    def finish(self, *, ended):
        self.ends.append(ended)


def test_a_tracker_is_told_once_whether_the_run_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "tensorboard", Held)
    run(quick_config(tmp_path, "run.name=whole", "log.tensorboard=true"), World())
    config = quick_config(tmp_path, "run.name=failing", "log.tensorboard=true")

    class Raises:
        def on_step(self, step):
            raise ValueError("enough")

    with pytest.raises(RunFailed):
        run(config, World(), callbacks=[Raises()])
    assert [one.ends for one in Held.made] == [[True], [False]]
    assert "figures/optimizer" in Held.made[0].drawn and not Held.made[1].drawn


def test_records_that_cannot_be_drawn_do_not_fail_a_run(tmp_path):
    config = quick_config(tmp_path, "run.name=here")
    (tmp_path / "config.yaml").write_text("- no sections")
    said: list = []
    one = TrackerRecord("tensorboard", config, tmp_path, 3, 0, said.append)
    record = Trackers([one], said.append, lambda: False)
    record.on_end(Result(tmp_path))
    record.close()
    assert not said


@pytest.mark.parametrize(("ended", "stopped", "patience", "line"), [
    (True, True, "_PATIENCE_WHEN_STOPPED", "not done 0.01 s after the request to stop; left alone"),
    (False, False, "_PATIENCE_WHEN_STOPPED", "not done 0.01 s after the failure; left alone"),
    (True, False, "_PATIENCE", "not done 0.01 s after the run; left alone"),
])  # fmt: skip
def test_a_tracker_that_hangs_is_left_alone(tmp_path, monkeypatch, ended, stopped, patience, line):
    """The others are told that the run ends; after a failure or a request to stop the wait is
    short."""
    released = threading.Event()

    class Hanging(Held):
        def finish(self, *, ended):
            released.wait()

    Held.made.clear()
    monkeypatch.setattr(records, patience, 0.01)
    monkeypatch.setitem(backends.BACKENDS, "tensorboard", Hanging)
    monkeypatch.setitem(backends.BACKENDS, "wandb", Held)
    config, said = quick_config(tmp_path), []
    made = [TrackerRecord(n, config, tmp_path, 3, 0, said.append) for n in ("tensorboard", "wandb")]
    for one in made:
        one.on_step(STEP)
    made[1].end()
    made[1].wait(10)
    record = Trackers(made, said.append, lambda: stopped)
    if ended:
        record.on_end(Result(tmp_path / "nothing"))
    record.close()
    record.close()  # as a run does that fails while it ends
    (told,) = said
    assert told.startswith(f"tracker   tensorboard: {line}")
    assert [one.ends for one in Held.made if not isinstance(one, Hanging)] == [[False]]
    released.set()


def test_a_tracker_that_is_told_nothing_is_not_begun(tmp_path, monkeypatch):
    Held.made.clear()
    monkeypatch.setitem(backends.BACKENDS, "tensorboard", Held)
    record = Trackers(
        [TrackerRecord("tensorboard", quick_config(tmp_path), tmp_path, 3, 0, print)], print,
        lambda: False,
    )  # fmt: skip
    record.close()  # of a run that failed before its first step
    assert not Held.made


def test_a_broken_tracker_changes_nothing(tmp_path, monkeypatch, capsys):
    whole = quick_config(tmp_path, "run.name=whole")
    run(whole, World())
    monkeypatch.setitem(backends.BACKENDS, "tensorboard", Broken)
    config = quick_config(tmp_path, "log.tensorboard=true", "log.progress=plain")
    run(config, World())
    assert losses(config.run_folder) == losses(whole.run_folder)
    out = capsys.readouterr().out
    line = "tracker   tensorboard failed, the run goes on without it (ConnectionError: no server)"
    assert out.count("tracker   ") == 1 and line in out


def test_names_and_packages_are_checked(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"log.trackers: 'wand' given; accepted: tensorboard, wandb"
    ):
        quick_config(tmp_path, "log.trackers=[wand]")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "comet_ml" else find(name, *a)
    )
    with pytest.raises(UserError) as raised:
        run(quick_config(tmp_path, "log.trackers=[comet]"), World())
    assert str(raised.value) == (
        "log.trackers: comet given, but the package comet_ml is not installed; accepted: pip "
        "install comet-ml, or log.trackers without it"
    )
    assert not (tmp_path / "runs").exists()
