"""The gated adapter, the one parametrisation that every method of this project steers."""

import torch
from torch import Tensor, nn


class GatedAdapter(nn.Module):
    """ΔW = Bᵀ diag(g) A over R components.

    Shapes: `A` (R, in), `g` (R), `B` (R, out). B is stored transposed, so that component j is
    row j of both matrices and any set of consecutive components is one contiguous slice.
    `mask` (R, bool) says which components train; the others stay bit-identical through a step.
    All three tensors are float32 whatever the backbone's dtype; the host casts them for its
    products. `g` is a parameter only where a method learns it.
    """

    mask: Tensor

    def __init__(self, A: Tensor, g: Tensor, B: Tensor, *, learn_gates: bool = False):
        super().__init__()
        rank = A.shape[0]
        if g.shape != (rank,) or B.shape[0] != rank:
            raise ValueError(
                f"A {tuple(A.shape)}, g {tuple(g.shape)}, B {tuple(B.shape)}: R differs"
            )
        self.A = nn.Parameter(A.float().contiguous())
        self.B = nn.Parameter(B.float().contiguous())
        self.g = nn.Parameter(g.float().contiguous(), requires_grad=learn_gates)
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=A.device))

    @property
    def rank(self) -> int:
        """R, the number of components held (active or not)."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """ΔW as a dense float32 matrix (out, in)."""
        return (self.B.detach() * self.g.detach().unsqueeze(1)).T @ self.A.detach()
