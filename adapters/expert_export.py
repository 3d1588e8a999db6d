"""Experts' adapters under the names of the published files, one LoRA for every matrix of an expert.

vLLM and SGLang read experts so (`…experts.3.gate_proj.lora_A.weight`) and refuse or drop PEFT's
layout of stacks. PEFT turns these names into its own while it loads
(`peft.utils.transformers_weight_conversion`), if the stacks are listed as `target_parameters`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""lora_A (r, in) and lora_B (out, r)."""


@dataclass(frozen=True)
class ExpertLayout:
    """How the published files hold a stack of experts."""

    out_features: int
    in_features: int
    """Of one expert's matrix in the stack."""
    names: Sequence[Sequence[str]]
    """For every expert, the modules whose matrices by rows are its matrix in the stack: one, or two
    (`gate_proj`, `up_proj`) of `gate_up_proj`."""


def per_expert_factors(
    stacks: Mapping[str, Mapping[int, Factors]], layouts: Mapping[str, ExpertLayout]
) -> tuple[dict[str, Factors], dict[str, int]]:
    """(factors by module, PEFT's rank by stack) of the stacks in `layouts`, from factors by stack
    and expert.

    Servers stack the factors of a projection over all experts and need all projections of an
    expert, so every expert of a mixture with an adapter gets factors of one rank, the largest,
    padded with zeros. Parts of one matrix share A; B is split by rows. PEFT joins such parts block
    by block, which adds up their ranks.
    """
    mixtures = {path.rpartition(".")[0] for path in stacks if path in layouts}
    rank = max((A.shape[0] for path in stacks if path in layouts
                for A, _ in stacks[path].values()), default=0)  # fmt: skip
    factors: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    for path, layout in layouts.items():
        if path.rpartition(".")[0] not in mixtures:
            continue
        ranks[path] = rank * len(layout.names[0])
        for expert, modules in enumerate(layout.names):
            none = torch.zeros(0, layout.in_features), torch.zeros(layout.out_features, 0)
            A, B = padded(stacks.get(path, {}).get(expert, none), rank)
            for module, rows in zip(modules, B.chunk(len(modules)), strict=True):
                factors[module] = (A.clone(), rows.contiguous())
    return factors, ranks


def padded(factors: Factors, rank: int) -> Factors:
    """The same product in factors of that rank, at least their own."""
    A, B = factors
    missing = rank - A.shape[0]
    return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))
