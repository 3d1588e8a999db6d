"""Shared by all tests: offline, one thread, real data beside the project where it is there."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)


def shared(path: str) -> Path:
    """A file or folder of the real data and models; the test is skipped where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"../shared/{path} is not here")
    return found


def pytest_sessionfinish() -> None:
    from tests.helpers import SERVER

    SERVER.close()


@pytest.fixture(autouse=True)
def _in_project_folder(monkeypatch):
    """Paths in shipped configurations are relative to the project."""
    monkeypatch.chdir(ROOT)
