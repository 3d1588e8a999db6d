"""docs/python.ipynb runs as it stands."""

import os

import pytest

from tests.helpers import ROOT

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    notebook = nbformat.read(ROOT / "docs/python.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "kept without outputs"
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=place).execute()
    assert (tmp_path / "runs/notebook/adapter/adapter_model.safetensors").is_file()
    shown = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "20 steps, eval_loss" in shown and "lora on `configs/quickstart/model`" in shown
    assert (tmp_path / "runs/notebook/report.html").is_file()
    assert "method.kind: 'lorra' given; accepted: lora" in shown
    assert "TqdmWarning" not in shown and "| 20/20 " in shown, "a bar"
