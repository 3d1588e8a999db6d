"""Sparsity of ΔW by layer (La-LoRA, eq. 1), from a run's checkpoints, against a count in NumPy."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from launch.report import main
from tests.helpers import quick_config
from tests.world.worker import train_only
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.run.sparsity import read_sparsity, small_entries


def test_small_entries_are_small_in_absolute_value():
    P = torch.tensor([[0.0, 9e-5, -9e-5], [1.1e-4, -1.1e-4, -3.0]])
    assert small_entries(P) == 3


def trained(tmp, name, *overrides):
    config = quick_config(
        tmp, f"run.name={name}", "data.eval=null", "checkpoint.every=2", "checkpoint.keep=9",
        "optim.learning_rate=2e-4", "optim.warmup_ratio=0", *overrides,
    )  # fmt: skip
    train_only(World(), config.model_dump())
    return config.run_folder


def by_hand(checkpoint, layer):
    """Eq. 1 and the mean rank of a layer, from the files."""
    tensors = {}
    for file in checkpoint.glob("*.safetensors"):
        tensors |= load_file(file)
    small = entries = rank = 0
    units = json.loads((checkpoint.parents[1] / "units.json").read_text())
    units = [unit for unit in units if unit["layer"] == layer]
    for unit in units:
        shape = unit["out_features"], unit["in_features"]
        P = np.zeros(shape)
        if f"adapter/{unit['name']}/A" in tensors:
            A, g, B, mask = (
                tensors[f"adapter/{unit['name']}/{part}"] for part in ("A", "g", "B", "mask")
            )
            P = sum(g[j] * np.outer(B[j], A[j]) for j in range(len(g)))
            rank += mask.sum()
        small += (np.abs(P) < 1e-4).sum()
        entries += P.size
    return math.log(small / (1e-4 * entries)), rank / len(units)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("lalora", ["method.gamma=20", "method.every=1", "method.contribution_scale=mean"]),
        ("weightlora", ["method.warmup_steps=2", "method.keep=9"]),
    ],
)
def test_the_sparsity_of_every_layer_at_every_checkpoint(tmp_path, kind, overrides):
    folder = trained(tmp_path, kind, f"method.kind={kind}", *overrides)
    found = read_sparsity(folder)
    assert list(found.steps) == [2, 4]
    for number, layer in enumerate(found.layers):
        for row, step in enumerate(found.steps):
            expected, rank = by_hand(folder / f"checkpoints/step-{step:08d}", int(layer))
            assert found.values[row, number] == pytest.approx(expected, abs=1e-3)
        assert found.ranks[number] == rank
    first, last = found.values
    assert max(first.max(), last.max()) <= math.log(1e4) + 1e-9
    # La-LoRA's increments grow; WeightLoRA's were drawn anew after step 2, with ΔW = 0.
    assert last.mean() < first.mean() if kind == "lalora" else last.mean() > first.mean()
    assert main([str(folder), "--sparsity", "--out", str(tmp_path / "out")]) == 0
    drawn = {file.name for file in (tmp_path / "out").iterdir()}
    assert {f"{n}.{s}" for n in ("sparsity", "sparsity_and_rank") for s in ("png", "svg")} <= drawn


def test_what_has_no_sparsity_is_refused(tmp_path):
    folder = trained(tmp_path, "pissa", "method.kind=pissa")
    with pytest.raises(UserError, match="trained by pissa; accepted by --sparsity: methods"):
        read_sparsity(folder)
