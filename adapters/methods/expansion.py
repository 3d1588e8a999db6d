"""Expansions of a survivor's adapter to a larger rank, ΔW = (α/r) B A with A (r, in), B (r, out).

`fresh` (in `lora.py`) redraws it. The two here keep the function: `factor` is what multiplied B A
before (ω, and the change of scale), and is folded into B.
"""

import torch

from adapters.gated import GatedAdapter


def keep_learned(learned: GatedAdapter, drawn: GatedAdapter, factor: float) -> GatedAdapter:
    """[A; N] with N the drawn rows made orthogonal to A and to one another, at their own norms, and
    [factor · B; 0]."""
    held = learned.rank
    A, B = drawn.A.detach().clone(), drawn.B.detach().clone()
    A[:held], B[:held] = learned.A.detach(), learned.B.detach() * factor
    Q = torch.linalg.qr(A.T.double())[0].T[held:]
    A[held:] = Q.to(A.dtype) * A[held:].norm(dim=1, keepdim=True)
    return GatedAdapter(A, drawn.g, B)


def orthonormalise(
    learned: GatedAdapter, drawn: GatedAdapter, factor: float, generator: torch.Generator
) -> GatedAdapter:
    """The authors' code for WeightLoRA+ (`FatAdamW`, "smart"), in our layout: Aᵀ = Q R,

        Aᵀ ← [Q, (I − Q Qᵀ) N],        B ← [factor · R B; 0]

    with N uniform on [0, 1). Where the new rank is the old one, A becomes orthonormal and nothing
    is added.
    """
    held, extra = learned.rank, drawn.rank - learned.rank
    Q, R = torch.linalg.qr(learned.A.detach().T.double())
    N = torch.rand(len(Q), extra, generator=generator, dtype=torch.float64)
    A = torch.cat([Q, N - Q @ (Q.T @ N)], dim=1).T.to(drawn.A.dtype).contiguous()
    B = drawn.B.detach().clone()
    B[:held] = (factor * R @ learned.B.detach().double()).to(B.dtype)
    return GatedAdapter(A, drawn.g, B)
