"""Hostile files of a model, and a DeepSpeed JSON; see test_hostile.py."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tests.helpers import QUICKSTART, quick_config
from tests.hostile import (
    attempt,
    damaged,
    fuzz,
    hostile_json,
    json_bytes,
    retyped,
    written,
)
from trainer.engine.deepspeed import merge, read_user_json, settings, sizes
from trainer.loading.safetensors_files import PretrainedFiles

ZERO3 = json.loads((QUICKSTART.parent / "deepspeed/zero3.json").read_text())


@fuzz()
@given(content=hostile_json(ZERO3))
def test_deepspeed_json(folder, content):
    path = written(folder, "zero3.json", content)
    config = quick_config(folder, "engine.kind=deepspeed", f"engine.config={path}")

    def read() -> None:
        ours = settings(config, 2, torch.float32)
        merge(
            merge(read_user_json(config), ours), {"zero_optimization": sizes(torch.nn.Linear(2, 2))}
        )

    attempt(folder, read)


TENSORS = {
    "model.embed.weight": torch.ones(6, 4),
    "model.scale": torch.ones(()),
    "model.half.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    "model.experts.gate": torch.ones(2, 3, 4),
    "model.index": torch.ones(3, dtype=torch.int64),
}
HEADER: dict[str, Any]
_length = struct.unpack("<Q", save(TENSORS)[:8])[0]
HEADER, _BODY = json.loads(save(TENSORS)[8 : 8 + _length]), save(TENSORS)[8 + _length :]
OFFSETS = [[0, 0], [0, 1], [0, 96], [96, 0], [0, 2**63], [-1, 4], [0, 10**9], [0], []]
DTYPES = ["F64", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "BOOL", "U64", "C64", "I8", "f32", "object"]
SHAPES = [
    [2**63],
    [0, 2**62],
    [0],
    [24],
    [1, 24],
    [-6, -4],
    [2**32, 2**32],
    [1] * 70,
    [6.0, 4],
    [0] * 9,
]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header says something else than its body."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(draw(st.integers(1, 2))):
        entry = header[draw(st.sampled_from(list(TENSORS)))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        entry[key] = draw(
            st.sampled_from({"dtype": DTYPES, "shape": SHAPES, "data_offsets": OFFSETS}[key])
        )
    return packed(json_bytes(header))


def packed(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + _BODY


def hostile_tensors() -> st.SearchStrategy[bytes]:
    return st.one_of(
        damaged(save(TENSORS)),
        headers(),
        retyped(HEADER).map(json_bytes).map(packed),
        damaged(json_bytes(HEADER)).map(packed),
        st.sampled_from([0, 1, 2**31, 10**8 + 1, 2**63, 2**64 - 1]).map(
            lambda length: packed(json_bytes(HEADER), length)
        ),
    )


def read_all(model: Path) -> None:
    """As a backbone is checked, identified and loaded."""
    files = PretrainedFiles(model)
    files.digest()
    for name, tensor in TENSORS.items():
        if tensor.dtype != torch.int64:
            assert files.read(files.check([name], tuple(tensor.shape))).shape == tensor.shape
    files.read_expert("model.experts.gate", 1, (2, 3, 4))


@fuzz()
@given(content=hostile_tensors())
def test_pretrained_file(folder, content):
    model = folder / "model"
    model.mkdir(exist_ok=True)
    written(model, "model.safetensors", content)
    attempt(folder, lambda: read_all(model))


INDEX = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(TENSORS, "a.safetensors")}


@fuzz()
@given(content=hostile_json(INDEX))
def test_index_of_pretrained_files(folder, content):
    model = folder / "indexed"
    model.mkdir(exist_ok=True)
    written(model, "a.safetensors", save(TENSORS))
    written(model, "model.safetensors.index.json", content)
    attempt(folder, lambda: read_all(model))
