"""The gated adapter, the parametrisation that all methods share."""

import torch
from torch import Tensor, nn


class Held:
    """Whether casts that adapters hold are those of their values."""

    valid: bool = False


class Magnitude:
    """DoRA's norms of the rows of W + ΔW (`adapters/layers/magnitude.py`): m (out), trained, and
    ‖W‖² by row (out), float32; on every rank."""

    def __init__(self, weight: Tensor):
        """`weight`: W (out, in), whole; m starts as its norms."""
        self.squares = weight.detach().float().square().sum(1)
        self.m = nn.Parameter(self.squares.sqrt())


class GatedAdapter(nn.Module):
    """ΔW = Bᵀ diag(g) A over R components.

    Shapes: `A` (R, in), `g` (R), `B` (R, out). B is stored transposed: component j is row j of both
    matrices, and consecutive components are one contiguous slice. `mask` (R, bool) selects the
    components that train; the others stay bit-identical through a step. All three tensors are
    float32 for any backbone dtype; the adapted layer casts them for its products. `g` has gradients
    only if the method uses them.
    """

    mask: Tensor
    held: tuple[Held, Tensor, Tensor] | None = None
    """Casts of A and B, for use while they are valid (`casts.py`)."""
    magnitude: Magnitude | None = None
    """A copy has none."""

    def __init__(self, A: Tensor, g: Tensor, B: Tensor):
        super().__init__()
        rank = A.shape[0]
        if g.shape != (rank,) or B.shape[0] != rank:
            raise ValueError(
                f"A {tuple(A.shape)}, g {tuple(g.shape)}, B {tuple(B.shape)}: R differs"
            )
        self.A = nn.Parameter(A.float().contiguous())
        self.B = nn.Parameter(B.float().contiguous())
        self.g = nn.Parameter(g.float().contiguous(), requires_grad=False)
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device=A.device))

    @classmethod
    def zeros(cls, rank: int, in_features: int, out_features: int) -> "GatedAdapter":
        """An adapter with R components, all zero."""
        return cls(
            torch.zeros(rank, in_features), torch.zeros(rank), torch.zeros(rank, out_features)
        )

    def copy(self) -> "GatedAdapter":
        """A copy of the tensors that does not train."""
        made = GatedAdapter(
            self.A.detach().clone(), self.g.detach().clone(), self.B.detach().clone()
        )
        return made.requires_grad_(False)

    @property
    def rank(self) -> int:
        """R, the number of components, active or not."""
        return self.A.shape[0]

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A, g and B cast to `dtype` and detached."""
        if self.held is not None:
            held, A, B = self.held
            if held.valid and A.dtype == dtype:
                return A, self.g.detach().to(dtype), B
        return self.A.detach().to(dtype), self.g.detach().to(dtype), self.B.detach().to(dtype)

    @property
    def gate_gradient(self) -> Tensor:
        """∂L/∂g (R); requires a preceding backward pass."""
        assert self.g.grad is not None
        return self.g.grad

    def delta(self) -> Tensor:
        """ΔW as a dense float32 matrix (out, in)."""
        return (self.B.detach() * self.g.detach().unsqueeze(1)).T @ self.A.detach()
