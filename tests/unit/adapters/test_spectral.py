"""Singular slices against `torch.linalg.svd`, banks by brute force, resampling against NumPy."""

import json
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from adapters.banks import LOCATIONS, bank, largest_rank
from adapters.spectral import resample, singular_triplets
from tests.conftest import shared

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def orthonormal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def with_spectrum(out, in_, spectrum):
    spectrum = torch.as_tensor(spectrum, dtype=torch.float64)
    rank = len(spectrum)
    return (orthonormal(out, rank) * spectrum) @ orthonormal(in_, rank).T


def banks(weight, rank, locations=LOCATIONS):
    return [bank(location, rank, min(weight.shape)) for location in locations]


def largest_banks(weight):
    return banks(weight, largest_rank(LOCATIONS, min(weight.shape)))


def check(weight, ranges):
    """The stated bounds hold; the largest error of each kind, relative to σ₁."""
    found = singular_triplets(weight, ranges)
    W = weight.detach().double()
    U, S, V, spectrum = found.U, found.S, found.V, found.spectrum
    indices = [i for r in ranges for i in r]
    k, d = len(indices), min(W.shape)
    assert (U.shape, S.shape, V.shape) == ((W.shape[0], k), (k,), (W.shape[1], k))
    assert spectrum.shape == (d,) and (spectrum >= 0).all() and (spectrum.diff() <= 0).all()
    assert all(t.dtype == torch.float64 and t.device == W.device for t in (U, S, V, spectrum))
    assert all(not t.requires_grad for t in (U, S, V, spectrum)) and (S >= 0).all()
    true = torch.linalg.svdvals(W)
    scale = true[0] if true[0] > 0 else 1.0
    eye = torch.eye(k, dtype=torch.float64, device=W.device)
    errors = {
        "spectrum": (spectrum - true).abs().max() / scale,
        "S": (S - true[indices]).abs().amax(0) / scale if k else torch.tensor(0.0),
        "U": torch.linalg.matrix_norm(U.T @ U - eye),
        "V": torch.linalg.matrix_norm(V.T @ V - eye),
        "Wv": (W @ V - U * S).norm(dim=0).amax(0) / scale if k else torch.tensor(0.0),
        "Wᵀu": (W.T @ U - V * S).norm(dim=0).amax(0) / scale if k else torch.tensor(0.0),
    }
    for kind, error in errors.items():
        assert error <= (1e-8 if kind in "UV" else 1e-6), (kind, float(error))
    return {kind: float(error) for kind, error in errors.items()}


def one_of_each_shape(folder):
    """(name, weight) of the first, middle and last matrix of every shape in a model's shards."""
    index, by_shape = folder / "model.safetensors.index.json", {}
    files = [folder / "model.safetensors"]
    if index.exists():
        names = json.loads(index.read_text())["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                shape = tuple(tensors.get_slice(name).get_shape())
                if len(shape) == 2:
                    by_shape.setdefault(shape, []).append((file, name))
    for found in by_shape.values():
        for file, name in {found[0], found[len(found) // 2], found[-1]}:
            with safe_open(file, "pt") as tensors:
                yield name, tensors.get_tensor(name)


@pytest.mark.parametrize("model", ["books-llama-28m", "stories260K"])
def test_real_weights(model):
    shapes = set()
    for _, weight in one_of_each_shape(shared(f"models/{model}")):
        shapes.add(tuple(weight.shape))
        check(weight, banks(weight, min(16, largest_rank(LOCATIONS, min(weight.shape)))))
    assert len(shapes) == 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (64, 64), (1, 50), (50, 1), (1, 1), (2, 3)])
def test_shapes(shape, device):
    weight = torch.randn(shape, dtype=torch.float64, device=device)
    errors = check(weight, largest_banks(weight))
    assert max(errors.values()) < 1e-12  # well conditioned: nothing is lost
    check(weight, [range(min(shape))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    weight = torch.nn.Parameter((torch.randn(48, 80) * 0.02).to(dtype))
    check(weight, largest_banks(weight))


def test_random_shapes_spectra_and_ranges():
    """Ranges cut at random and shuffled, of matrices of any shape, rank and condition."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for _ in range(150):
        out, in_ = rng.integers(1, 60, size=2)
        d = int(min(out, in_))
        kept = int(rng.integers(0, d + 1))
        spectrum = 10.0 ** -rng.uniform(0, rng.choice([1, 6, 9, 14]), size=kept)
        spectrum = np.sort(np.round(spectrum, int(rng.choice([1, 16]))))[::-1]  # some are equal
        weight = with_spectrum(out, in_, spectrum.copy()) * 10.0 ** rng.integers(-9, 9)
        edges = np.sort(
            rng.choice(d + 1, size=2 * int(rng.integers(1, (d + 1) // 2 + 1)), replace=False)
        )
        ranges = [range(a, b) for a, b in edges.reshape(-1, 2).tolist()]
        check(weight, [ranges[i] for i in rng.permutation(len(ranges))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(70, 48), (48, 70), (48, 48)])
@pytest.mark.parametrize(
    "spectrum",
    [
        [1.0] * 48,  # all equal
        [5.0] * 12 + [2.0] * 24 + [1e-3] * 12,  # equal ones straddle every border of the banks
        [3.0] * 20 + [1e-7] * 28,  # within what the Gram matrix cannot tell from 0
        np.logspace(0, -14, 48),
        np.logspace(-3, -9, 48),
        [1.0] + [1e-8] * 47,
        [1.0] + [1e-6 * 0.99] * 24 + [1e-6 * 1.01] * 23,  # either side of the threshold
        [1.0],  # medium and minor lie wholly in the null space
        [4.0, 3.0, 2.0, 1.0] * 5,
        [],
    ],
)
def test_hard_spectra(shape, spectrum, device):
    torch.manual_seed(0)
    weight = with_spectrum(*shape, np.sort(np.asarray(spectrum, dtype=float))[::-1].copy())
    weight = weight.to(device)
    for rank in (1, 5, 12):
        check(weight, banks(weight, rank))
        for location in LOCATIONS:
            check(weight, banks(weight, rank, [location]))
    check(weight, [range(48)])
    check(weight, [range(i, i + 1) for i in reversed(range(48))])


def test_null_space_is_exact_where_the_weight_is():
    """Integers of rank 2, and zero rows and columns: null values come out at rounding, not √ε."""
    weight = torch.zeros(30, 20)
    weight[:7, :5] = torch.outer(torch.arange(7.0), torch.arange(5.0)) + 1
    found = singular_triplets(weight, banks(weight, 5))
    assert (found.S[:2] > 1).all() and (found.S[2:] < 1e-12).all()
    check(weight, banks(weight, 5))
    zero = singular_triplets(torch.zeros(6, 9), [range(6)])
    assert not zero.S.any() and not zero.spectrum.any()


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e-40, 1e40, 1e200, 1e306])
def test_scale_is_of_no_concern(scale):
    weight = torch.randn(20, 12, dtype=torch.float64)
    ours = singular_triplets(weight * scale, [range(12)])
    true = torch.linalg.svdvals(weight)
    assert torch.allclose(ours.S / scale, true, rtol=1e-9, atol=0)
    assert torch.allclose(ours.spectrum / scale, true, rtol=1e-9, atol=0)


def test_banks_taken_out_leave_the_rest():
    """What methods build on: W − Σ U S Vᵀ has the other singular values, and 0 for the banks'."""
    weight = torch.randn(40, 64, dtype=torch.float64)
    ranges = banks(weight, 6)
    found = singular_triplets(weight, ranges)
    true, taken = torch.linalg.svdvals(weight), [i for r in ranges for i in r]
    assert torch.allclose(found.S, true[taken])
    assert torch.allclose(found.spectrum[taken], found.S)
    rest = torch.linalg.svdvals(weight - (found.U * found.S) @ found.V.T)
    true[taken] = 0
    assert torch.allclose(rest, true.sort(descending=True).values, atol=1e-12)


def test_same_input_same_bits_and_input_untouched():
    for weight in (torch.randn(90, 60), torch.randn(90, 3) @ torch.randn(3, 60)):
        before = weight.clone()
        first, second = (singular_triplets(weight, banks(weight, 8)) for _ in range(2))
        for name in ("U", "S", "V", "spectrum"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert torch.equal(weight, before)


def test_order_and_empty_ranges():
    """Triplets come in the order of the ranges; an empty range asks for none."""
    weight = torch.randn(30, 20)
    there = singular_triplets(weight, [range(3), range(15, 20)])
    back = singular_triplets(weight, [range(15, 20), range(7, 7), range(3)])
    order = [5, 6, 7, 0, 1, 2, 3, 4]
    assert torch.allclose(there.S, back.S[order])
    assert torch.allclose(there.V, back.V[:, order]) and torch.allclose(there.U, back.U[:, order])
    for nothing in ([], [range(4, 4)]):
        assert check(weight, nothing)["spectrum"] < 1e-12


@pytest.mark.parametrize(
    "ranges",
    [
        [range(3), range(2, 5)],
        [range(2, 5), range(3)],
        [range(5), range(2, 3)],
        [range(2), range(2)],
        [range(-1, 2)],
        [range(8, 11)],
        [range(10, 12)],
        [range(0, 6, 2)],
        [range(3, 0, -1)],
    ],
)
def test_bad_ranges(ranges):
    with pytest.raises(ValueError, match=r"accepted are disjoint ranges of step 1 in \[0, 10\)"):
        singular_triplets(torch.randn(10, 12), ranges)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.uint8)],
)
def test_bad_weights(weight):
    with pytest.raises(ValueError, match="accepted is a float matrix"):
        singular_triplets(weight, [])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(bad):
    weight = torch.randn(5, 6)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        singular_triplets(weight, [range(2)])


def test_banks():
    assert bank("primary", 3, 11) == range(0, 3)
    assert bank("medium", 3, 11) == range(5, 8)
    assert bank("minor", 3, 11) == range(8, 11)
    with pytest.raises(ValueError, match="'middle': accepted are primary, medium, minor"):
        bank("middle", 3, 11)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_largest_rank_by_brute_force(count):
    def fits(locations, rank, d):
        indices = [i for location in locations for i in bank(location, rank, d)]
        return len(set(indices)) == len(indices) and all(0 <= i < d for i in indices)

    for locations in permutations(LOCATIONS, count):
        for d in range(1, 60):
            expected = max(rank for rank in range(d + 2) if fits(locations, rank, d))
            assert largest_rank(locations, d) == expected


def test_largest_rank_in_closed_form():
    for d in (1, 2, 3, 4, 5, 7, 8, 4095, 4096, 8191):
        half = d - d // 2
        assert largest_rank(LOCATIONS, d) == half // 2
        assert largest_rank(["medium", "minor"], d) == half // 2
        assert largest_rank(["primary", "minor"], d) == d // 2
        assert largest_rank(["primary", "medium"], d) == min(d // 2, half)
        assert [largest_rank([location], d) for location in LOCATIONS] == [d, half, d]
        for pair in combinations(LOCATIONS, 2):
            assert largest_rank(pair, d) == largest_rank(pair[::-1], d)


@pytest.mark.parametrize("points", [1, 2, 3, 7, 256])
@pytest.mark.parametrize("d", [1, 2, 5, 256, 1000])
def test_resample(d, points):
    spectrum = torch.rand(d, dtype=torch.float64).sort(descending=True).values * 37
    expected = np.interp(np.linspace(0, d - 1, points), np.arange(d), spectrum.numpy())
    ours = resample(spectrum, points)
    assert ours.shape == (points,) and ours.dtype == torch.float32
    assert np.allclose(ours.numpy(), expected / float(spectrum[0]), atol=1e-7)
    assert ours[0] == 1 and (
        d == 1 or points == 1 or ours[-1] == (spectrum[-1] / spectrum[0]).float()
    )


def test_resample_of_zeros_and_of_nothing():
    assert torch.equal(resample(torch.zeros(5), 8), torch.zeros(8))
    for spectrum, points in ((torch.zeros(0), 4), (torch.zeros(3), 0), (torch.zeros(2, 2), 4)):
        with pytest.raises(ValueError, match="resampled to"):
            resample(spectrum, points)
