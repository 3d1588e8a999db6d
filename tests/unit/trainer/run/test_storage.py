"""What a run leaves on disk: synced, readable as the umask says, and nothing where the disk is
full."""

import os
import resource
import signal
import stat
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.helpers import quick_config
from trainer.data import cache
from trainer.distributed.world import World
from trainer.errors import RunFailed, UserError
from trainer.export.export import export_run
from trainer.run.run import run


def config(tmp, *more):
    return quick_config(
        tmp, "run.steps=1", "method.kind=pissa", "method.rank=2", "method.targets=[q_proj]",
        "data.eval=null", *more,
    )  # fmt: skip


@contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: a limit of the operating system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def tree(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, made under umask 027, and the paths that were synced."""
    tmp, synced, honest = tmp_path_factory.mktemp("finished"), set(), os.fsync

    def fsync(descriptor):
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        honest(descriptor)

    before = os.umask(0o027)
    with patch.object(os, "fsync", fsync):
        run(config(tmp), World())
    os.umask(before)
    return tmp, synced


def test_what_every_checkpoint_needs_is_on_disk_as_they_are(finished):
    tmp, synced = finished
    folder = tmp / "runs/quickstart"
    names = {str(Path(path).relative_to(tmp)) for path in synced if path.startswith(str(tmp))}
    assert any(".initial.safetensors" in name for name in names)
    assert any(name.endswith("adapter.partial/adapter_model.safetensors") for name in names)
    assert {str(path.relative_to(tmp)) for path in (folder, folder.parent)} <= names


def test_files_and_folders_have_the_mode_of_the_umask(finished):
    tmp, _ = finished
    for path in tmp.rglob("*"):
        wanted = 0o750 if path.is_dir() else 0o640
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


@pytest.mark.parametrize("what", ["adapter", "merged", "backbone"])
def test_a_disk_that_fills_up_during_an_export(what, finished, tmp_path):
    source = finished[0] / "runs/quickstart"
    with full_disk(5000), pytest.raises(UserError, match="out: cannot be written") as caught:
        export_run(source, tmp_path / "out", World(), what=what)
    assert "File too large" in str(caught.value)
    assert tree(tmp_path) == []
    export_run(source, tmp_path / "out", World(), what=what)


@pytest.mark.parametrize(
    ("size", "named"),
    [(5000, "tokens.arrows|data.cache"), (40_000, r"spectra/\w+.safetensors: cannot be written")],
)
def test_a_cache_that_is_full_is_named(size, named, tmp_path):
    more = ["data.train_records=8"] if size > 5000 else []
    wide = config(tmp_path, "method.rank=64", *more)
    with full_disk(size), pytest.raises(UserError, match=named):
        run(wide, World())
    assert not wide.run_folder.exists()
    assert not [name for name in tree(tmp_path) if "partial" in name]


def test_a_disk_that_fills_up_before_the_first_step(finished, tmp_path):
    small = config(tmp_path, f"data.cache={finished[0]}/cache")
    with (
        full_disk(5000),
        pytest.raises(UserError, match=r"initial\.safetensors: cannot be written"),
    ):
        run(small, World())
    assert not [name for name in tree(tmp_path) if "partial" in name]
    run(small, World())


def test_a_disk_that_fills_up_after_the_last_step(finished, tmp_path):
    small = config(tmp_path, f"data.cache={finished[0]}/cache")
    failure = OSError(28, "No space left on device")
    with patch("adapters.peft_export.save_file", side_effect=failure):
        with pytest.raises(RunFailed, match=r"adapter: cannot be written \(No space"):
            run(small, World())
    assert not [name for name in tree(small.run_folder) if "adapter" in name]
    run(small, World())
    assert (small.run_folder / "adapter/adapter_model.safetensors").is_file()


def test_a_cache_entry_that_cannot_be_read_is_a_miss(finished, tmp_path, monkeypatch):
    """Another user's. (Root reads everything: the system's answer is made up.)"""
    own = config(tmp_path, f"data.cache={tmp_path}/cache")
    run(own, World())
    (theirs,) = [path for path in (tmp_path / "cache").iterdir() if path.name != "spectra"]
    honest = os.access
    monkeypatch.setattr(
        cache.os,
        "access",
        lambda path, mode: theirs not in Path(path).parents and honest(path, mode),
    )
    run(config(tmp_path, "run.name=again"), World())
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {"spectra", theirs.name, f"{theirs.name}-{os.getuid()}"}
