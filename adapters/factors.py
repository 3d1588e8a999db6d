"""What was learned of each unit's weight, ΔW: as factors of low rank, or merged into W."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.expert_export import Factors
from adapters.gated import GatedAdapter


@dataclass(frozen=True)
class Part:
    """A part of a unit's update: an adapter, minus what it was initialised as (a part of W)."""

    adapter: GatedAdapter
    initial: GatedAdapter | None = None


def parts_by_unit(
    adapters: Mapping[str, GatedAdapter],
    initial: Mapping[str, GatedAdapter],
    frozen: Mapping[str, GatedAdapter],
    *,
    splits_weight: bool,
) -> dict[str, list[Part]]:
    """All that was learned, by unit: `adapters`, and the `frozen` ones of earlier stages.
    `initial`, which was taken out of W, is where the former began if their method
    `splits_weight`; else where the latter did."""
    found: dict[str, list[Part]] = {}
    for held, splits in ((adapters, splits_weight), (frozen, not splits_weight)):
        for name, adapter in held.items():
            part = Part(adapter, initial.get(name) if splits else None)
            found.setdefault(name, []).append(part)
    return found


def lora_factors(
    adapter: GatedAdapter, initial: GatedAdapter | None = None
) -> tuple[Tensor, Tensor]:
    """(lora_A (r, in), lora_B (out, r)) in float32 with ΔW = lora_B lora_A; lora_B includes g.

    Components whose gate is 0 are omitted. If the first components were initialised as `initial`, a
    part of W, the update relative to W is a LoRA of twice as many of these as have ever changed,

        B g A − B₀ g₀ A₀ = (B g − B₀ g₀) A + B₀ g₀ (A − A₀),

    in this form because it does not lose small differences of large products at serving precision.
    If nothing was taken out of W (B₀ = 0), it is a LoRA of the components whose B is no longer 0.
    """
    A, B = _folded(adapter)
    nonzero = adapter.g.detach().cpu() != 0
    if initial is None:
        return A[nonzero], B[nonzero].T.contiguous()
    if not bool(initial.B.any()):
        moved = B.any(1)
        return A[moved], B[moved].T.contiguous()
    A0, B0 = _folded(initial)
    count = len(A0)
    more = nonzero.clone()
    more[:count] = False
    changed = (A[:count] != A0).any(1) | (B[:count] != B0).any(1)
    A0, B0, A1, B1 = A0[changed], B0[changed], A[:count][changed], B[:count][changed]
    left, right = torch.cat([A1, A1 - A0, A[more]]), torch.cat([B1 - B0, B0, B[more]])
    return left, right.T.contiguous()


def stacked(parts: Sequence[Factors]) -> Factors:
    """The sum of several products as one, of the sum of their ranks."""
    left, right = zip(*parts, strict=True)
    return torch.cat(left), torch.cat(right, 1)


def _folded(adapter: GatedAdapter) -> tuple[Tensor, Tensor]:
    """A (R, in) and g ∘ B (R, out), on the CPU."""
    return adapter.A.detach().cpu(), (adapter.B.detach() * adapter.g.detach().unsqueeze(1)).cpu()


def compressed(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A (≤ rank, in), B (out, ≤ rank), squared error ‖ΔW − BA‖²): the nearest product of that
    rank, by Eckart–Young on the factors' QR decompositions."""
    Qb, Rb = torch.linalg.qr(B.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    lost = float(S[rank:].square().sum())
    root = S[:rank].sqrt()
    lora_A = (root.unsqueeze(1) * Vh[:rank]) @ Qa.T
    return lora_A.float().contiguous(), ((Qb @ U[:, :rank]) * root).float().contiguous(), lost


def unit_factors(
    parts: Mapping[str, Sequence[Part]], rank: int | None
) -> tuple[dict[str, Factors], float]:
    """(factors by unit, relative error of compressing them to `rank`)."""
    units: dict[str, Factors] = {}
    lost = whole = 0.0
    for name, of_unit in parts.items():
        A, B = stacked([lora_factors(part.adapter, part.initial) for part in of_unit])
        if rank is not None:
            whole += float((A @ A.T).double().mul((B.T @ B).double()).sum())  # ‖BA‖²
            if A.shape[0] > rank:
                A, B, cut = compressed(A, B, rank)
                lost += cut
        units[name] = (A, B)
    return units, (lost / whole) ** 0.5 if whole else 0.0


@torch.no_grad()
def merged(weight: Tensor, parts: Sequence[Part], magnitude: Tensor | None = None) -> Tensor:
    """W + Σ (ΔW − ΔW₀), summed in float32, its rows scaled to DoRA's `magnitude` if given, cast to
    W's dtype."""
    total = weight.float()
    for part in parts:
        delta = part.adapter.delta()
        if part.initial is not None:
            delta = delta - part.initial.delta()
        total = total + delta.to(weight.device)
    if magnitude is not None:
        total *= (magnitude.to(total) / total.norm(dim=1)).unsqueeze(1)
    return total.to(weight.dtype)
