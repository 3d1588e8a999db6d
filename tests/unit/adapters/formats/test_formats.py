"""Frozen weight formats against references written here."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from adapters.formats import formats
from adapters.formats.formats import FORMATS
from adapters.formats.names import FORMAT_NAMES

SHAPES = [(64, 128), (96, 40), (7, 65), (1, 3)]  # in and out of step with blocks of 64


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_packed_size_and_error(name, shape, dtype):
    weight = matrix(shape).to(dtype)
    packed = FORMATS[name].pack(weight, dtype)
    assert packed.dtype == dtype
    assert packed.numel() * packed.element_size() == FORMATS[name].nbytes(shape, dtype)
    restored = FORMATS[name].unpack(packed, shape, dtype)
    assert restored.shape == weight.shape and restored.dtype == dtype
    error = ((restored - weight).float().norm() / weight.float().norm()).item()
    assert error <= {"none": 0.0, "nf4": 0.13, "fp4": 0.17, "int8": 0.02, "fp8": 0.03}[name]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_is_what_bitsandbytes_makes(kind):
    weight = matrix((128, 192))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind)
    expected = bnb.dequantize_4bit(codes, state)
    packed = FORMATS[kind].pack(weight, torch.float32)
    assert torch.equal(FORMATS[kind].unpack(packed, (128, 192), torch.float32), expected)


def test_nf4_rounds_to_the_nearest_of_the_sixteen_published_values():
    # QLoRA, appendix E.
    code = np.array(
        [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
         0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    )  # fmt: skip
    weight = matrix((8, 128), seed=3)
    blocks = weight.double().numpy().reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs(blocks[..., None] / scale[..., None] - code).argmin(-1)
    expected = (code[nearest] * scale).reshape(8, 128)
    packed = FORMATS["nf4"].pack(weight, torch.float32)
    restored = FORMATS["nf4"].unpack(packed, (8, 128), torch.float32).double().numpy()
    assert np.abs(restored - expected).max() < 1e-6 * scale.max()


def test_int8_is_row_wise_absmax():
    weight = matrix((32, 48), seed=4)
    scale = weight.abs().amax(1, keepdim=True)
    expected = (weight / scale * 127).round() * scale / 127
    packed = FORMATS["int8"].pack(weight, torch.float32)
    restored = FORMATS["int8"].unpack(packed, (32, 48), torch.float32)
    assert (restored - expected).abs().max() <= 1.01 * scale.max() / 127  # a tie may go either way
    assert ((restored - expected).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(64, 128), (5, 65), (32, 64)])
def test_large_stacks_are_packed_in_parts(shape, monkeypatch):
    weight = matrix(shape)
    whole = FORMATS["nf4"].pack(weight, torch.float32)
    restored = FORMATS["nf4"].unpack(whole, shape, torch.float32)
    monkeypatch.setattr(formats, "_MAX_WEIGHTS", 2048)
    assert torch.equal(FORMATS["nf4"].pack(weight, torch.float32), whole)
    assert torch.equal(FORMATS["nf4"].unpack(whole, shape, torch.float32), restored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rounds_to_the_nearest_of_its_numbers(dtype):
    """All numbers of e4m3, from its definition: ±(1 + m/8)·2^(e−7), subnormals m/8·2^−6, NaN for
    s.1111.111."""
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    code = np.array(sorted({s * x for x in positive[:-1] for s in (-1, 1)}))
    assert code.max() == 448
    weight = (matrix((16, 96), seed=5) * torch.logspace(-3, 3, 16).unsqueeze(1)).to(dtype)
    weight[3] = 0
    packed = FORMATS["fp8"].pack(weight, dtype)
    restored = FORMATS["fp8"].unpack(packed, (16, 96), torch.float32).double().numpy()
    exact = weight.double().numpy()
    scale = np.abs(exact).max(1, keepdims=True) / 448
    scale = torch.from_numpy(scale).bfloat16().double().numpy()
    scale[3] = 1
    nearest = np.abs((exact / scale)[..., None] - code).min(-1) * scale
    # What lies halfway may go either way, and division rounds: the distance is what counts.
    np.testing.assert_allclose(np.abs(restored - exact), nearest, atol=1e-6 * 448 * scale.max())
    assert not restored[3].any()


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8"])
def test_bits_survive_a_copy_and_a_cast_to_their_own_dtype(name):
    packed = FORMATS[name].pack(matrix((64, 64)).bfloat16(), torch.bfloat16)
    copied = packed.to(torch.bfloat16).clone()
    assert torch.equal(copied.view(torch.uint8), packed.view(torch.uint8))


def test_the_configuration_knows_every_format():
    assert tuple(FORMATS) == FORMAT_NAMES
