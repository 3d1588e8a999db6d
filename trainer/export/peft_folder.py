"""Read an adapter's folder, PEFT's or one of ours, onto the matrices of a model.

Only what is a plain LoRA is taken: ΔW = s B A with s = α/r (or α/√r) by matrix. Whatever else a
configuration may ask for, or the tensors hold, is refused by name.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load
from torch import Tensor

from adapters.gated import GatedAdapter
from adapters.layers.expert_modules import AdaptedExperts, swapped_stacks
from trainer.config.yaml import parse_json
from trainer.errors import UserError, reason, refuse_mismatch
from trainer.export.expert_layouts import expert_layouts
from trainer.model.peft_names import PeftKeys

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "init_lora_weights", "base_model_name_or_path", "target_parameters",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "target_modules",
    "exclude_modules", "lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "modules_to_save", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
"""Keys that change nothing of what the tensors compute: how they were chosen or trained."""
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Those that leave W as it is."""
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Factors:
    """lora_A, lora_B as in the file."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class PeftFolder:
    """An adapter's folder, read but not yet brought onto a model."""

    path: Path
    config: Mapping[str, Any]
    factors: Mapping[str, Factors]
    """By the key in the file."""
    heads: Mapping[str, Tensor]
    """All other tensors: parameters of modules trained in full, by name."""
    digest: str
    """SHA-256 of both files."""

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as its folder names it."""
        return self.config.get("base_model_name_or_path")

    def scale(self, name: str) -> tuple[int, float]:
        """(r, s) of a matrix by PEFT's name."""
        rank = self._of_matrix("rank_pattern", "r", name)
        alpha = self._of_matrix("alpha_pattern", "lora_alpha", name)
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return rank, alpha / divisor

    def _of_matrix(self, pattern: str, key: str, name: str) -> int:
        """A value for one matrix, matched as PEFT does."""
        for part, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({part})$", name):
                return value
        return self.config.get(key, 8)

    def refuse(self, what: str, accepted: str = "an adapter of this model") -> UserError:
        return UserError(f"model.adapter: {self.path}: {what}; accepted: {accepted}")

    def adapters(self, model: "PreTrainedModel") -> dict[str, GatedAdapter]:
        """The adapters by unit. Raises UserError naming one that this model does not take."""
        keys, experts = PeftKeys(model), _Experts(self, model)
        found: dict[str, GatedAdapter] = {}
        for key, factors in self.factors.items():
            if experts.take(key, keys.found(key), factors):
                continue
            path = keys.found(key)
            parameter = f"{path}.weight" in (self.config.get("target_parameters") or ())
            rank, scale = self.scale(f"{path}.weight" if parameter else path)
            if factors.A.shape[0] != rank:
                raise self.refuse(f"{key} has rank {factors.A.shape[0]}, its {CONFIG} says {rank}")
            found[path] = _gated(factors.A, factors.B, scale)
        return found | experts.adapters()


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's."""
    return (path / CONFIG).is_file()


def read_peft_folder(path: Path) -> PeftFolder:
    """Raises UserError naming what is missing, damaged, or more than a plain LoRA."""
    file = path / TENSORS
    try:
        text = (path / CONFIG).read_text(encoding="utf-8")
        config = parse_json(text)
        if not isinstance(config, dict):
            raise ValueError("no mapping")
        if file.exists() and not file.is_file():
            raise ValueError(f"{TENSORS} is no regular file")
        content = file.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"model.adapter: {path}: no {Path(error.filename).name}; accepted: an adapter saved as "
            "safetensors"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter: {path}: cannot be read ({reason(error)})") from error
    _refuse_other_kinds(path, config)
    factors: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    with refuse_mismatch(file):
        for name, tensor in load(content).items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"model.adapter: {file}: {name} holds values that are not finite")
            key, role = re.sub(r"\.lora_([AB])\.weight$", "", name), name[-8:-7]
            key = key.removeprefix(_PREFIX)
            if key != name.removeprefix(_PREFIX):
                factors.setdefault(key, {})[role] = tensor.float()
            elif "lora_" in name:
                raise UserError(
                    f"model.adapter: {file}: {name} is no factor of a linear layer's LoRA; "
                    "accepted: lora_A and lora_B of linear layers"
                )
            else:
                heads[key] = tensor
        pairs = {key: Factors(parts["A"], parts["B"]) for key, parts in factors.items()}
    digest = hashlib.sha256(text.encode() + content).hexdigest()
    return PeftFolder(path, config, pairs, heads, digest)


def _refuse_other_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError naming the key by which an adapter is more than a plain LoRA."""
    asked = {
        key: value
        for key, value in config.items()
        if value and key not in _READ and key not in _WITHOUT_EFFECT
    }
    for key, accepted in (("peft_type", ("LORA",)), ("bias", ("none",))):
        if config.get(key, accepted[0]) not in accepted:
            asked[key] = config[key]
    if config.get("init_lora_weights", True) not in _INITIALISATIONS:
        asked["init_lora_weights"] = config["init_lora_weights"]
    for key, value in asked.items():
        raise UserError(
            f"model.adapter: {path}/{CONFIG}: {key}: {value!r} is more than a plain LoRA on an "
            "unchanged model; accepted: one without it"
        )


def _gated(A: Tensor, B: Tensor, scale: float) -> GatedAdapter:
    """From lora_A (r, in) and lora_B (out, r)."""
    return GatedAdapter(A, torch.full((len(A),), scale), B.T)


class _Experts:
    """The factors of stacked experts, in either layout of `adapters/peft_export.py`."""

    def __init__(self, folder: PeftFolder, model: "PreTrainedModel"):
        self._folder = folder
        self._modules = {p: m for p, m in model.named_modules() if isinstance(m, AdaptedExperts)}
        self._layouts = expert_layouts(model)
        self._swapped = swapped_stacks(model)
        self._owner = {
            module: (stack, expert)
            for stack, layout in self._layouts.items()
            for expert, modules in enumerate(layout.names)
            for module in modules
        }
        self._parts: dict[tuple[str, int], dict[str, Factors]] = {}
        self._whole: dict[str, Factors] = {}

    def take(self, key: str, path: str, factors: Factors) -> bool:
        """Whether a key of the file, which PEFT finds at `path`, belongs to experts."""
        if key in self._owner:
            self._parts.setdefault(self._owner[key], {})[key] = factors
            return True
        module = path.removesuffix(".base_layer")
        if module not in self._modules:
            return False
        up = f"{module}.{self._modules[module].form.up}"
        targets = self._folder.config.get("target_parameters") or ()
        down_too = any(f"{module}.down_proj".endswith(target) for target in targets)
        # PEFT wraps a module once per parameter; `down_proj`, registered last, is outermost.
        self._whole[up if path != module or not down_too else f"{module}.down_proj"] = factors
        return True

    def adapters(self) -> dict[str, GatedAdapter]:
        """By unit, of the experts taken."""
        return dict([*self._of_stacks(), *self._of_matrices()])

    def _of_stacks(self) -> Iterator[tuple[str, GatedAdapter]]:
        for stack, factors in self._whole.items():
            experts = self._modules[stack.rpartition(".")[0]].experts
            rank, scale = self._folder.scale(stack)
            if factors.A.shape[0] != rank * experts:
                raise self._folder.refuse(f"{stack} has no factors of rank {rank} per expert")
            A = factors.A.view(experts, rank, -1)
            B = factors.B.view(-1, rank, experts)
            for expert in range(experts):
                left, right = A[expert], B[:, :, expert]
                if stack in self._swapped:
                    left, right = right.T, left.T
                yield f"{stack}.{expert}", _gated(left, right, scale)

    def _of_matrices(self) -> Iterator[tuple[str, GatedAdapter]]:
        for (stack, expert), parts in self._parts.items():
            modules = self._layouts[stack].names[expert]
            if missing := [module for module in modules if module not in parts]:
                raise self._folder.refuse(f"no factors of {missing[0]}")
            pairs = [parts[module] for module in modules]
            A, B = pairs[0].A, torch.cat([pair.B for pair in pairs])
            if any(not torch.equal(pair.A, A) for pair in pairs):
                A = torch.cat([pair.A for pair in pairs])
                B = torch.block_diag(*(pair.B for pair in pairs))
            yield f"{stack}.{expert}", _gated(A, B, self._folder.scale(stack)[1])
