"""Some singular triplets of a weight and its whole spectrum, and the slices that LeLoRA trains.

    G = WᵀW = V Λ Vᵀ        σ_j = ‖W v_j‖        W V_s = U_s R  (Householder QR)

W is the weight with its larger side first. One symmetric eigenproblem in float64 on the smaller
side gives every V at once, 12 times faster than `torch.linalg.svd` on a GPU; only the wanted
columns V_s are taken through W again.

What this loses: squaring. G is known to ε = c·2⁻⁵³·σ₁², with c of about 10, so directions below
√ε, some 1e-8 σ₁ to 1e-7 σ₁, mix among themselves, and √λ says no more about them. What is promised
survives it, 1e-6 σ₁ for singular values and for ‖W v − σ u‖ and ‖Wᵀ u − σ v‖ of every triplet:

- V is orthonormal to rounding, whatever the eigenvalues, and Householder's U is so too, even where
  W V_s is rounding or exactly 0. So null directions are completed on both sides without a case of
  their own.
- R is diagonal but for what G did not resolve: |r_ij| is at most σ_j, as a part of W v_j, and about
  ε/σ_i, as v_i and v_j are orthogonal under G. The smaller of the two never exceeds √ε.
- A u_j from W v_j alone carries ε/σ_j of other directions. This is 1e-8 σ₁ at σ_j = 1e-6 σ₁, where
  slices of real weights stay above. Below that, all larger directions enter the QR first, which
  takes them out of u_j; it costs as much as the eigenproblem, but is needed for (nearly) rank-
  deficient weights only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.banks import fits

_NEARLY_NULL = 1e-6  # of the largest singular value; see the module's docstring


@dataclass(frozen=True)
class Triplets:
    """Some singular triplets of a matrix W (out, in), and all of its singular values."""

    U: Tensor  # (out, k) float64, orthonormal columns
    S: Tensor  # (k,) float64, >= 0
    V: Tensor  # (in, k) float64, orthonormal columns
    spectrum: Tensor  # (min(out, in),) float64, descending


@torch.no_grad()
def singular_triplets(weight: Tensor, ranges: Sequence[range]) -> Triplets:
    """The triplets with the singular indices in `ranges` (0 = largest), in the order given.

    `weight` (out, in) is of any float dtype; results are on its device. S is measured on the
    vectors, so it is finer than `spectrum` (√λ) and differs from it by up to 1e-7 σ₁. Raises
    ValueError unless the weight is a finite matrix and the ranges are disjoint, of step 1 and
    within [0, min(out, in)).
    """
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        shape, dtype = tuple(weight.shape), weight.dtype
        raise ValueError(f"singular triplets of {shape} {dtype}: accepted is a float matrix")
    d = min(weight.shape)
    if not fits(ranges, d):
        raise ValueError(f"{list(ranges)}: accepted are disjoint ranges of step 1 in [0, {d})")
    W = weight.to(torch.float64, copy=True)
    largest = torch.linalg.vector_norm(W, ord=torch.inf)
    if not largest.isfinite():
        raise ValueError("singular triplets of a matrix with values that are not finite")
    scale = torch.where(largest > 0, largest, 1.0)
    W /= scale  # so that squares neither overflow nor vanish
    wide = W.shape[0] < W.shape[1]
    if wide:
        W = W.T
    spectrum, vectors = _right(_gram(W))
    left, S, right = _slices(W, spectrum, vectors, [i for r in ranges for i in r])
    return Triplets(
        U=right if wide else left,
        S=S * scale,
        V=left if wide else right,
        spectrum=spectrum * scale,
    )


def _gram(W: Tensor) -> Tensor:
    """G = WᵀW (d, d)."""
    return W.T @ W


def _right(G: Tensor) -> tuple[Tensor, Tensor]:
    """σ (d,), descending, and V (d, d)."""
    eigenvalues, vectors = torch.linalg.eigh(G)
    return eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _slices(
    W: Tensor, spectrum: Tensor, V: Tensor, indices: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """U_s, S_s and V_s of these singular indices."""
    wanted = torch.tensor(indices, dtype=torch.int64, device=W.device)
    columns = wanted.sort().values  # the larger ones first into the QR
    images = W @ V[:, columns]
    if (torch.linalg.vector_norm(images, dim=0) <= _NEARLY_NULL * spectrum[0]).any():
        columns = torch.arange(int(columns[-1]) + 1, device=W.device)
        images = W @ V[:, columns]
    Q, R = torch.linalg.qr(images)
    signs = torch.ones_like(R.diagonal()).copysign(R.diagonal())
    place = torch.searchsorted(columns, wanted)
    S = torch.linalg.vector_norm(images, dim=0)[place]
    return (Q * signs)[:, place], S, V[:, wanted]


def cost(out_features: int, in_features: int) -> float:
    """What `singular_triplets` takes, in no unit: d² times (the larger side, for the Gram matrix,
    and 32 d for the eigenproblem, which a GPU solves far below its peak)."""
    d = min(out_features, in_features)
    return d * d * (max(out_features, in_features) + 32.0 * d)


def resample(spectrum: Tensor, points: int) -> Tensor:
    """`spectrum` (d,) as (points,) float32 with largest 1, whatever d; that of a 0 matrix is 0.

    Linear interpolation over the index, both ends kept. ValueError where either has no point.
    """
    if spectrum.ndim != 1 or not spectrum.numel() or points < 1:
        raise ValueError(f"no spectrum {tuple(spectrum.shape)} resampled to {points} points")
    values = spectrum.double()
    largest = values.max()
    values = values / torch.where(largest > 0, largest, 1.0)
    return F.interpolate(values[None, None], points, mode="linear", align_corners=True)[
        0, 0
    ].float()
