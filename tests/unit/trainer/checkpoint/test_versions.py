"""Checkpoints of other versions: earlier ones are read, others are left alone and named."""

import json
import shutil

import pytest

from tests.helpers import ROOT, losses, quick_config
from trainer import __version__
from trainer.checkpoint import store
from trainer.distributed.world import World
from trainer.errors import DamagedCheckpoint, UserError
from trainer.export.export import export_run
from trainer.run.run import run

KEPT = ROOT / "tests/kept/pissa"
"""A run of 6 steps that was stopped after 3, as an earlier version left it: commit d465223 of
2026-11-27, version 0.1.0, whose checkpoints hold the data's key and a sample of the weights."""
OPTIONS = [
    "run.name=kept", "run.steps=6", "checkpoint.every=3", "checkpoint.keep=1",
    "method.kind=pissa", "method.rank=2", "method.targets=[q_proj]",
]  # fmt: skip


def test_a_run_of_the_version_before_goes_on_to_the_same_losses(tmp_path):
    run(quick_config(tmp_path, *OPTIONS, "run.name=whole"), World())
    shutil.copytree(KEPT, tmp_path / "runs/kept")
    before = (KEPT / "metrics.jsonl").read_text()
    run(quick_config(tmp_path, *OPTIONS), World())
    folder = tmp_path / "runs/kept"
    assert (folder / "metrics.jsonl").read_text().startswith(before), "it began anew"
    assert losses(folder) == pytest.approx(losses(tmp_path / "runs/whole"), rel=1e-4)
    state = json.loads((store.newest(folder / "checkpoints") / "state.json").read_text())
    assert (state["step"], state["version"]) == (6, __version__)


def test_a_run_of_the_version_before_is_exported(tmp_path):
    export_run(KEPT, tmp_path / "out", World())
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("finished")
    run(config(tmp), World())
    return tmp


@pytest.fixture
def saved(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path, tmp_path / "runs/quickstart/checkpoints"


def config(tmp, *more):
    overrides = ("run.steps=3", "checkpoint.every=1", "method.rank=2", "data.eval=null")
    return quick_config(tmp, *overrides, *more)


def rewrite(checkpoint, **changes):
    """state.json with other values, and intact checksums."""
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, **changes}))
    (checkpoint / "manifest.json").unlink()
    store.write_manifest(checkpoint)


LATER = {
    "format": lambda folder: rewrite(folder, format=2, version="9.9"),
    "unknown key": lambda folder: rewrite(folder, wheels=4, version="9.9"),
    "no state": lambda folder: rewrite(folder, step="many", version="9.9"),
    "manifest": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({"format": 2, "version": "9.9", "files": []})
    ),
}


@pytest.mark.parametrize("kind", list(LATER))
@pytest.mark.parametrize("resume", ["auto", "older"])
def test_what_another_version_wrote_is_left_alone(kind, resume, saved):
    """Resuming from an older one would overwrite it."""
    tmp, folder = saved
    LATER[kind](folder / "step-00000003")
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    where = "auto" if resume == "auto" else folder / "step-00000002"
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            run(config(tmp, f"run.resume={where}", "run.steps=4"), World())
        assert "version 9.9" in str(caught.value) and __version__ in str(caught.value)
        assert not isinstance(caught.value, DamagedCheckpoint)
        with pytest.raises(UserError, match=r"version 9\.9"):
            export_run(folder.parent, tmp / "out", World())
    assert {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()} == before


def test_a_checkpoint_without_rights_is_not_set_aside(saved, monkeypatch):
    """Not readable is not damaged. (Root may read all: the system's answer is made up.)"""
    tmp, folder = saved
    honest = store._open

    def refuse(checkpoint, name):
        if checkpoint.name == "step-00000003":
            raise PermissionError(13, "Permission denied", str(checkpoint / name))
        return honest(checkpoint, name)

    monkeypatch.setattr(store, "_open", refuse)
    with pytest.raises(UserError, match=r"step-00000003/.* cannot be read \(Permission denied\)"):
        run(config(tmp, "run.steps=4"), World())
    assert len(store.complete(folder)) == 3


def test_what_was_set_aside_is_never_overwritten(saved):
    tmp, folder = saved
    for number in (1, 2, 3):
        newest = folder / "step-00000003"
        file = next(newest.glob("*.safetensors"))
        file.write_bytes(b"%d" % number)
        run(config(tmp), World())
    aside = sorted(folder.glob("damaged-*"))
    assert [path.name for path in aside] == [
        "damaged-step-00000003", "damaged-step-00000003-2", "damaged-step-00000003-3",
    ]  # fmt: skip
    contents = [next(path.glob("*.safetensors")).read_bytes() for path in aside]
    assert contents == [b"1", b"2", b"3"]
