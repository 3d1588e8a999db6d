"""Selected singular triplets of a weight, and its full spectrum.

    G = WᵀW = V Λ Vᵀ        σ_j = ‖W v_j‖        W V_s = U_s R  (Householder QR)

W is the weight with its larger side first. One symmetric eigenproblem in float64 on the smaller
side gives all of V, 12 times faster than `torch.linalg.svd` on a GPU; only the selected columns
V_s are multiplied by W again.

Squaring loses precision. G is known to ε = c·2⁻⁵³·σ₁², with c of about 10, so directions below √ε,
some 1e-8 σ₁ to 1e-7 σ₁, mix among themselves, and √λ does not resolve them. Singular values, and
‖W v − σ u‖ and ‖Wᵀ u − σ v‖ of every triplet, are nevertheless accurate to 1e-6 σ₁:

- V is orthonormal to rounding for any eigenvalues, and so is Householder's U, even where W V_s is
  rounding error or exactly 0. Null directions are therefore completed on both sides without a
  special case.
- R is diagonal except for what G does not resolve: |r_ij| is at most σ_j, as a part of W v_j, and
  about ε/σ_i, as v_i and v_j are orthogonal under G. The smaller of the two never exceeds √ε.
- A u_j from W v_j alone contains ε/σ_j of other directions: 1e-8 σ₁ at σ_j = 1e-6 σ₁, and slices of
  real weights stay above that. Below it, all larger directions enter the QR first, which removes
  them from u_j. This costs as much as the eigenproblem, but only (nearly) rank-deficient weights
  need it.
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
    """Selected singular triplets of a matrix W (out, in), and all of its singular values."""

    U: Tensor  # (out, k) float64, orthonormal columns
    S: Tensor  # (k,) float64, >= 0
    V: Tensor  # (in, k) float64, orthonormal columns
    spectrum: Tensor  # (min(out, in),) float64, descending


@torch.no_grad()
def singular_triplets(weight: Tensor, ranges: Sequence[range]) -> Triplets:
    """The triplets of the singular indices in `ranges` (0 = largest), in the order given.

    `weight` (out, in) has any float dtype; results are on its device. S is computed from the
    vectors, so it is more accurate than `spectrum` (√λ) and differs from it by up to 1e-7 σ₁.
    Raises ValueError unless the weight is a finite matrix and the ranges are disjoint, of step 1
    and within [0, min(out, in)).
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
    W /= scale  # so that squares neither overflow nor underflow
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
    index = torch.searchsorted(columns, wanted)
    S = torch.linalg.vector_norm(images, dim=0)[index]
    return (Q * signs)[:, index], S, V[:, wanted]


def cost(out_features: int, in_features: int) -> float:
    """Relative cost of `singular_triplets`: d² · (larger side + 32 d), the Gram matrix and the
    eigenproblem, which a GPU solves far below its peak."""
    d = min(out_features, in_features)
    return d * d * (max(out_features, in_features) + 32.0 * d)


def resample(spectrum: Tensor, points: int) -> Tensor:
    """`spectrum` (d,) interpolated to (points,) float32 and scaled to a largest value of 1; zeros
    for a zero matrix.

    Linear interpolation over the index, both ends included. Raises ValueError if `spectrum` is
    empty or `points` < 1.
    """
    if spectrum.ndim != 1 or not spectrum.numel() or points < 1:
        raise ValueError(f"no spectrum {tuple(spectrum.shape)} resampled to {points} points")
    values = spectrum.double()
    largest = values.max()
    values = values / torch.where(largest > 0, largest, 1.0)
    return F.interpolate(values[None, None], points, mode="linear", align_corners=True)[
        0, 0
    ].float()
