"""Shared by all tests: offline, one thread, real data beside the project where it is there."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)
# Under nohup it would be ignored here and in what tests start, who ask what a hangup does.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def shared(path: str) -> Path:
    """A file or folder of the real data and models; the test is skipped where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"../shared/{path} is not here")
    return found


def pytest_sessionfinish() -> None:
    from tests.helpers import SERVER, drop_random_models

    SERVER.close()
    drop_random_models()


@pytest.fixture(scope="session", autouse=True)
def _lean() -> Iterator[list[Any]]:
    """Runs draw no figures, among other things; see `lean_patches`."""
    from tests.helpers import lean_patches

    patches = lean_patches()
    for one in patches:
        one.start()
    yield patches
    for one in patches:
        one.stop()


@pytest.fixture(autouse=True)
def _whole(request, _lean) -> Iterator[None]:
    """Tests marked `whole_runs` have runs as users have them."""
    patches = _lean if request.node.get_closest_marker("whole_runs") else []
    for one in patches:
        one.stop()
    yield
    for one in patches:
        one.start()


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """What exists before a module's tests, a million objects of torch and transformers above all,
    is none of the garbage collector's business: it would take half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _in_project_folder(monkeypatch):
    """Paths in shipped configurations are relative to the project."""
    monkeypatch.chdir(ROOT)
