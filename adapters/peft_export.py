"""Export gated adapters as a plain LoRA for PEFT, vLLM and SGLang.

The gates are folded into B, so that alpha/r = 1 in every unit: loaders that ignore PEFT's per-unit
rank and alpha patterns, such as vLLM, still compute the right product.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.expert_export import ExpertLayout, Factors, padded, per_expert_factors
from adapters.factors import parts_by_unit, unit_factors
from adapters.gated import GatedAdapter
from adapters.unit import stem

_PER_EXPERT = """The experts' factors have the names of the published files, as vLLM and SGLang
read them; PEFT (0.21 or later, with transformers 5) converts them while it loads.

    vllm serve MODEL --enable-lora --max-lora-rank {0} --lora-modules NAME=FOLDER

{0}, the largest rank in adapter_config.json, or more. SGLang needs `--lora-target-modules all`
and one rank for all matrices (`rankcast export --same-rank`)."""
_STACKED = """The experts' factors are stacked as PEFT's `target_parameters`, which PEFT loads.
Servers that want every expert by itself refuse or drop them: `rankcast export --experts per_expert`
where the model's files hold every expert by itself, or serve the merged model."""
_ADDED_TOKENS = """The tokenizer in this folder has tokens of this adapter, which holds their rows
of the embedding and the output head (`trainable_token_indices`). Servers that read LoRA alone need
the merged model."""
_STAGES = (
    "Holds what earlier stages learned and what was trained beside it, as one LoRA of the sum of "
    "their ranks, for the original model."
)
_COMPRESSED = "Compressed to rank {}: relative error {:.2%} (Frobenius)."


@dataclass(frozen=True)
class TrainedTokens:
    """Rows of a few tokens, for PEFT's `trainable_token_indices`."""

    ids: Sequence[int]
    rows: Mapping[str, Tensor]
    """(n, width) by path of the embedding and of a head that is not tied to it: PEFT ties one that
    is."""
    names: Mapping[str, str]
    """The names from which PEFT finds these modules."""
    resize: str | None
    """Argument of `resize_token_embeddings`, where the base model's tables lack rows."""


@dataclass(frozen=True)
class Exported:
    """What was written of an adapter."""

    ranks: Mapping[str, int]
    """Of the update by unit; without units of rank 0."""
    notes: Sequence[str]
    """On what loads it, and on what it holds."""
    error: float
    """‖ΔW − ΔW_r‖ / ‖ΔW‖ of the compression over all units (Frobenius), 0 without it."""


class NothingToExport(ValueError):
    """No unit has a component: PEFT would load a folder without adapters as the plain model."""


def export_adapter(
    folder: Path,
    adapters: Mapping[str, GatedAdapter],
    *,
    base_model: str,
    revision: str | None = None,
    task_type: str | None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    initial: Mapping[str, GatedAdapter] | None = None,
    frozen: Mapping[str, GatedAdapter] | None = None,
    splits_weight: bool = True,
    rank: int | None = None,
    same_rank: bool = False,
    experts: Mapping[str, int] | None = None,
    swapped: Collection[str] = (),
    fan_in_fan_out: bool = False,
    layouts: Mapping[str, ExpertLayout] | None = None,
    former_experts: Collection[str] = (),
    key: Callable[[str], str] = str,
    modules_to_save: Sequence[str] | None = None,
    tokens: TrainedTokens | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write a PEFT folder: adapter_model.safetensors, adapter_config.json.

    `adapters` by module path; `heads`: fully trained modules by path, each its parameters by name;
    `task_type`: PEFT's name of the task, None if it has none; `initial`: the parts of W
    that adapters were initialised as; `frozen`, `splits_weight`: as in `parts_by_unit`, further
    components of the same LoRA; `experts`: number of experts by path of their stack. Stacks in
    `layouts` are written expert by expert (`per_expert_factors`); the adapters of any other become
    one LoRA on its parameter (PEFT's `target_parameters`), with the largest of their ranks;
    `swapped`: stacks that PEFT takes for transposed ones; `fan_in_fan_out`: adapted modules hold
    (in, out), as `Conv1D` does (PEFT corrects it per module); `former_experts`: names of modules
    that PEFT takes for experts; `key`: the name, of a module, from which PEFT finds it;
    `modules_to_save`: the names from which PEFT finds `heads`, if not their paths; `tokens`: rows
    of tokens, whose tokenizer the caller saves beside; `magnitudes`: DoRA's m by unit. Units of
    rank 0 are omitted, since PEFT rejects them.

    `rank`: compress every unit to at most this rank. `same_rank`: pad all units with zeros to the
    largest rank, empty ones too. Raises NothingToExport.
    """
    heads = heads or {}
    parts = parts_by_unit(adapters, initial or {}, frozen or {}, splits_weight=splits_weight)
    units, error = unit_factors(parts, rank)
    if same_rank:
        largest = max((A.shape[0] for A, _ in units.values()), default=0)
        units = {name: padded(factors, largest) for name, factors in units.items()}
    units = {name: (A, B) for name, (A, B) in units.items() if A.shape[0]}
    lora = _Lora(former_experts, key)
    served = lora.add_units(units, experts or {}, layouts or {}, swapped)
    if not lora.ranks:
        raise NothingToExport("no matrix has an adapter whose update is other than zero")
    lora.add_heads(heads)
    lora.add_tokens(tokens)
    lora.add_magnitudes(magnitudes or {})
    config = {
        **lora.config(modules_to_save or sorted(heads)),
        "fan_in_fan_out": fan_in_fan_out,
        "use_dora": bool(magnitudes),
        "base_model_name_or_path": base_model,
        "revision": revision,
        "task_type": task_type,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    notes = [
        served,
        _ADDED_TOKENS if tokens is not None else "",
        _STAGES if frozen else "",
        _COMPRESSED.format(rank, error) if rank is not None else "",
    ]
    ranks = {name: A.shape[0] for name, (A, _) in units.items()}
    return Exported(ranks, [note for note in notes if note], error)


class _Lora:
    """Tensors, ranks and targets of a PEFT folder."""

    def __init__(self, former_experts: Collection[str], key: Callable[[str], str]) -> None:
        self._former_experts, self._key = former_experts, key
        self.tensors: dict[str, Tensor] = {}
        self.ranks: dict[str, int] = {}
        """By PEFT's name of the adapted module or parameter."""
        self.joined: set[str] = set()
        """Those that PEFT joins from several factors, whose ranks add up."""
        self.modules: list[str] = []
        self.parameters: list[str] = []
        self._tokens: TrainedTokens | None = None

    def add_units(
        self,
        units: Mapping[str, Factors],
        experts: Mapping[str, int],
        layouts: Mapping[str, ExpertLayout],
        swapped: Collection[str],
    ) -> str:
        """Linear layers and experts. Returns a note on what loads them, "" without experts."""
        stacks: dict[str, dict[int, Factors]] = {}
        for name, factors in units.items():
            if stem(name) in experts:
                stacks.setdefault(stem(name), {})[int(name.rpartition(".")[2])] = factors
            else:
                self.add_linear(name, factors)
        return self.add_experts(stacks, experts, layouts, swapped)

    def add_heads(self, heads: Mapping[str, Mapping[str, Tensor]]) -> None:
        for path, head in heads.items():
            for name, value in head.items():
                self.tensors[f"base_model.model.{path}.{name}"] = value.cpu().contiguous()

    def add_tokens(self, tokens: TrainedTokens | None) -> None:
        self._tokens = tokens
        for path, rows in tokens.rows.items() if tokens is not None else ():
            name = f"base_model.model.{self._key(path)}.token_adapter.trainable_tokens_delta"
            self.tensors[name] = rows.detach().cpu().contiguous()

    def add_magnitudes(self, magnitudes: Mapping[str, Tensor]) -> None:
        for name, m in magnitudes.items():
            vector = f"base_model.model.{self._key(name)}.lora_magnitude_vector"
            self.tensors[vector] = m.detach().cpu().clone()

    def config(self, modules_to_save: Sequence[str]) -> dict[str, object]:
        """What adapter_config.json says of ranks, targets and tokens."""
        found = _peft_config(self.ranks, self.joined, sorted(self.modules), modules_to_save)
        if self._tokens is not None:
            names, ids = self._tokens.names, list(self._tokens.ids)
            found["trainable_token_indices"] = {names[path]: ids for path in self._tokens.rows}
        if self.parameters:
            found["target_parameters"] = sorted(self.parameters)
        return found

    def add_linear(self, name: str, factors: Factors) -> None:
        """A linear layer. As one of `target_modules` PEFT would take those with the names of former
        experts for these (dense layers, shared experts): they are `target_parameters`."""
        if name.rpartition(".")[2] in self._former_experts:
            self.parameters.append(f"{name}.weight")
            self.ranks[f"{name}.weight"] = factors[0].shape[0]
        else:
            self.modules.append(name)
            self.ranks[name] = factors[0].shape[0]
        self._put(self._key(name), factors)

    def add_experts(
        self,
        stacks: Mapping[str, Mapping[int, Factors]],
        experts: Mapping[str, int],
        layouts: Mapping[str, ExpertLayout],
        swapped: Collection[str],
    ) -> str:
        """Stacks of experts. Returns a note on what loads them, "" without any."""
        matrices, ranks = per_expert_factors(stacks, layouts)
        for module, factors in matrices.items():
            self._put(module, factors)
        self.ranks |= ranks
        self.joined |= {path for path in ranks if len(layouts[path].names[0]) > 1}
        self.parameters += ranks
        stacked = {name: parts for name, parts in stacks.items() if name not in layouts}
        for name, parts in stacked.items():
            self.parameters.append(name)
            A, B = stacked_factors(parts, experts[name], swapped=name in swapped)
            self.ranks[name] = A.shape[0] // experts[name]
            self._put(self._key(_wrapped(name, stacked)), (A, B))
        if stacked:
            return _STACKED
        return _PER_EXPERT.format(max(self.ranks.values())) if ranks else ""

    def _put(self, path: str, factors: Factors) -> None:
        self.tensors[f"base_model.model.{path}.lora_A.weight"] = factors[0].contiguous()
        self.tensors[f"base_model.model.{path}.lora_B.weight"] = factors[1].contiguous()


def stacked_factors(
    parts: Mapping[int, tuple[Tensor, Tensor]], experts: int, *, swapped: bool = False
) -> tuple[Tensor, Tensor]:
    """PEFT's factors of a stack from (A (r, in), B (out, r)) by expert: lora_A (E · r, in), with an
    expert's components adjacent, and lora_B (out, r · E), with a component's experts adjacent.
    Missing components are zero. `swapped`: of the transposed stack, ΔWᵀ = Aᵀ Bᵀ."""
    if swapped:
        parts = {expert: (B.T, A.T) for expert, (A, B) in parts.items()}
    rank = max(A.shape[0] for A, _ in parts.values())
    one_A, one_B = next(iter(parts.values()))
    lora_A = torch.zeros(experts, rank, one_A.shape[1])
    lora_B = torch.zeros(one_B.shape[0], rank, experts)
    for expert, (A, B) in parts.items():
        lora_A[expert, : A.shape[0]] = A
        lora_B[:, : A.shape[0], expert] = B
    return lora_A.flatten(0, 1), lora_B.flatten(1)


def _wrapped(name: str, stacks: Mapping[str, object]) -> str:
    """Module path of a parameter's LoRA in PEFT, which wraps a module once per adapted parameter,
    the first one innermost; `down_proj` is registered last."""
    module, _, parameter = name.rpartition(".")
    inner = parameter != "down_proj" and f"{module}.down_proj" in stacks
    return f"{module}.base_layer" if inner else module


def _peft_config(
    ranks: Mapping[str, int], joined: Collection[str], modules: list[str], heads: Sequence[str]
) -> dict[str, object]:
    """LoraConfig as plain data. `r` is the most frequent rank of the file's factors; others go to
    the patterns."""
    values = [rank for name, rank in ranks.items() if name not in joined]
    common = max(set(values), key=lambda rank: (values.count(rank), rank)) if values else 1
    others = {f"^{name}$".replace(".", r"\."): r for name, r in ranks.items() if r != common}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": modules,
        "modules_to_save": list(heads) or None,
        "lora_dropout": 0.0,
        "bias": "none",
    }
