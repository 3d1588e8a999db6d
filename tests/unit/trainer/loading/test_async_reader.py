"""Byte ranges of files, the identity of weights, and who reads what."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.errors import UserError
from trainer.loading import async_reader
from trainer.loading.assignment import assign_matrices
from trainer.loading.safetensors_files import PretrainedFiles
from trainer.loading.spectral_init import _fingerprint

TENSORS = {
    "matrix": torch.randn(300, 7).bfloat16(),
    "stack": torch.randn(3, 5, 4),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "wide": torch.randn(2, 5000),
    "numbers": torch.arange(9),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def files(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return PretrainedFiles(tmp_path)


@pytest.mark.parametrize("piece", [64, 1000, 2**20])
def test_pieces_make_up_the_tensor(files, monkeypatch, piece):
    monkeypatch.setattr(async_reader, "_PIECE", piece)
    waiting = {key: files.begin(key) for key in TENSORS}  # all at once
    for key, wait in waiting.items():
        value = wait()
        assert value.dtype == TENSORS[key].dtype and torch.equal(value, TENSORS[key])
    expert = files.read_expert("stack", 1, (3, 5, 4))
    assert torch.equal(expert, TENSORS["stack"][1])
    held = sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert files.bytes_read == held + expert.numel() * 4


def test_digest_is_that_of_the_tensors_middles(files, tmp_path):
    digest = hashlib.sha256()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for key in sorted(TENSORS):
            tensor = file.get_tensor(key)
            if tensor.dim():
                middle = tensor.shape[0] // 2
                tensor = tensor[middle : middle + 1]
            tensor = tensor.reshape(-1)
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes()[:4096])
    assert files.digest() == digest.hexdigest()


def test_a_file_that_ends_early_says_so(files, tmp_path):
    file = tmp_path / "model.safetensors"
    files.read("numbers")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    with pytest.raises(UserError, match=r"model.safetensors: not a readable.*ends \d+ bytes too"):
        for key in TENSORS:
            files.read(key)


def test_work_is_dealt_evenly():
    assert assign_matrices([], 2) == []
    assert assign_matrices([5.0, 1.0, 4.0, 4.0, 2.0], 1) == [0] * 5
    costs = [28672.0, 28672.0, 28672.0, 8192.0, 8192.0, 1024.0, 1024.0] * 4
    hands = assign_matrices(costs, 4)
    loads = [sum(c for c, h in zip(costs, hands, strict=True) if h == hand) for hand in range(4)]
    assert max(loads) == min(loads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fingerprint_sees_every_bit_of_every_place(dtype):
    weight = torch.randn(96, 70).to(dtype)
    seen = {_fingerprint(weight)}
    data = weight.view(torch.uint8).flatten()
    for place in range(0, data.numel(), 97):
        data[place] ^= 1 << (place % 8)  # undone never: each is another matrix
        seen.add(_fingerprint(weight))
    assert len(seen) == len(range(0, data.numel(), 97)) + 1
    assert _fingerprint(weight) == _fingerprint(weight.clone())
