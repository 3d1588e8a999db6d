"""Exports of a run that still trains: whole, and of one of its checkpoints."""

import json
import shutil
import threading
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import ALL, quick_config
from trainer.checkpoint import saved, store
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at 1 and 2, and what is exported of each."""
    tmp = tmp_path_factory.mktemp("finished")
    config = quick_config(
        tmp, "run.steps=2", "checkpoint.every=1", "method.rank=2", "data.eval=null"
    )
    run(config, World())
    exported = []
    for checkpoint in store.complete(config.run_folder / "checkpoints"):
        export_run(checkpoint, tmp / checkpoint.name, World())
        exported.append(load_file(tmp / checkpoint.name / "adapter_model.safetensors"))
    return config.run_folder, exported


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000001")
    return tmp_path / "run"


def same(out, tensors) -> bool:
    found = load_file(out / "adapter_model.safetensors")
    return found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )


def once(name, before):
    """Patches a function of `store` so that `before` happens ahead of its first call."""
    honest, calls = getattr(store, name), []

    def patched(*arguments, **options):
        if not calls:
            calls.append(None)
            before()
        return honest(*arguments, **options)

    return patch.object(store, name, patched)


def replace_by_newer(folder):
    """What a run that keeps one checkpoint does with the next."""
    checkpoint = store.newest(folder / "checkpoints")
    number = int(checkpoint.name.removeprefix("step-")) + 1
    hidden = folder / "checkpoints/.new"
    shutil.copytree(checkpoint, hidden)
    state = json.loads((hidden / "state.json").read_text())
    state["step"] = state["progress"]["step"] = number
    (hidden / "state.json").write_text(json.dumps(state))
    (hidden / "manifest.json").unlink()
    store.write_manifest(hidden)
    hidden.rename(folder / f"checkpoints/step-{number:08d}")
    store.remove(checkpoint)


@pytest.mark.parametrize("stage", ["_open", "_verified"])
def test_a_checkpoint_that_is_deleted_while_it_is_read(stage, folder, finished, tmp_path):
    """Before its files are opened the next one is taken; afterwards they are read all the same."""
    with once(stage, lambda: replace_by_newer(folder)):
        export_run(folder, tmp_path / "out", World())
    assert same(tmp_path / "out", finished[1][1])


def test_a_listing_between_two_checkpoints_that_has_neither(folder, finished, tmp_path):
    find, missed = store.find, [(None, None, [])]
    with patch.object(store, "find", lambda *where: missed.pop() if missed else find(*where)):
        export_run(folder, tmp_path / "out", World())
    assert not missed and same(tmp_path / "out", finished[1][1])
    complete, missed = store.complete, [[]]
    with patch.object(store, "complete", lambda of: missed.pop() if missed else complete(of)):
        assert saved.is_saved(folder)
    assert not missed


def test_a_run_that_deletes_faster_than_one_can_read_is_named(folder, tmp_path):
    with patch.object(store, "_open", lambda *_: replace_by_newer(folder)):
        with patch.object(saved, "_TRIES", 3), pytest.raises(UserError, match=r"checkpoint\.keep"):
            export_run(folder, tmp_path / "out", World())
    assert not (tmp_path / "out").exists()


def test_exports_during_saves_are_whole(folder, finished, tmp_path):
    ended = threading.Event()

    def train():
        while not ended.is_set():
            replace_by_newer(folder)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for number in range(200 if ALL else 4):
            export_run(folder, tmp_path / f"out-{number}", World())
            assert same(tmp_path / f"out-{number}", finished[1][1])
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("damage", ["no adapters", "gates of 0"])
def test_what_changes_nothing_is_not_exported(damage, folder, tmp_path):
    """Whatever its checksums say."""
    checkpoint = store.newest(folder / "checkpoints")
    tensors = store.read_tensors(checkpoint)
    if damage == "no adapters":
        tensors = {n: t for n, t in tensors.items() if n.startswith("random/")}
    else:
        tensors = {n: t * 0 if n.endswith("/g") else t for n, t in tensors.items()}
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    (checkpoint / "manifest.json").unlink()
    save_file(tensors, checkpoint / "shard-0.safetensors")
    store.write_manifest(checkpoint)
    with pytest.raises(UserError, match="no matrix has an adapter"):
        export_run(folder, tmp_path / "out", World())
    assert not (tmp_path / "out").exists()
