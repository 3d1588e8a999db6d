"""How PEFT reads the names in an adapter's folder.

PEFT applies transformers' table of conversions, which is for the keys of a model's files, to
adapters too: it takes modules called as the experts of transformers 4 for experts, and renames the
adapters' keys. So what the table would rename wrongly is written under the files' names.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapters.unit import stem
from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_ROUTER = "gate"
"""PEFT also takes modules of this name for routers of transformers 4."""


def former_experts(model: "PreTrainedModel") -> frozenset[str]:
    """Names of modules that PEFT's `target_modules` takes for experts that are one stack now,
    whatever they are in this model (`gate_proj` of a dense MLP); empty where there are none."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = {
        source.removesuffix(".weight").rpartition(".")[2]
        for conversion in get_checkpoint_conversion_mapping(model.config.model_type) or []
        if any(type(o).__name__ == "MergeModulelist" for o in getattr(conversion, "operations", []))
        for source in conversion.source_patterns
    }
    return frozenset(names | {_ROUTER}) if names else frozenset()


def modules_to_save(model: "PreTrainedModel", heads: Iterable[str]) -> list[str]:
    """PEFT's names of the modules at `heads`. It takes every module whose path ends so: where there
    are others (`head`, and `vision_model.head`), the path from PEFT's own module."""
    paths = [path for path, _ in model.named_modules()]
    return sorted(
        f"base_model.model.{head}"
        if any(path != head and path.endswith(head) for path in paths)
        else head
        for head in heads
    )


def lost_by_peft(model: "PreTrainedModel", targets: Iterable[str]) -> dict[str, str]:
    """The linear layers whose adapters PEFT would take for others', by path, and what is wrong."""
    key = PeftKeys(model)
    lost = {}
    for path in targets:
        if stem(path) == path:  # experts are named by their stack
            try:
                key(path)
            except UserError as error:
                lost[path] = str(error)
    return lost


class PeftKeys:
    """The key of a module's adapter in a PEFT folder, from which PEFT finds this module."""

    def __init__(self, model: "PreTrainedModel"):
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            get_model_conversion_mapping,
        )
        from transformers.core_model_loading import WeightRenaming

        self._model = type(model).__name__
        self._renamings: list[WeightRenaming] = []
        if get_checkpoint_conversion_mapping(model.config.model_type) is not None:
            table = get_model_conversion_mapping(model)
            self._renamings = [r for r in table if isinstance(r, WeightRenaming)]

    def __call__(self, path: str) -> str:
        """The key for a module's path. Raises UserError where PEFT would find another module."""
        if self.found(path) == path:
            return path
        published = f"{path}.weight"
        for renaming in reversed(self._renamings):
            published, _ = renaming.reverse_transform().rename_source_key(published)
        published = published.removesuffix(".weight")
        if self.found(published) == path:
            return published
        raise UserError(
            f"method.targets: {path}: PEFT would load its adapter as that of {self.found(path)}, "
            f"by transformers' conversions for {self._model}; accepted: other layers"
        )

    def found(self, key: str) -> str:
        """Path of the module that PEFT finds: as in its
        `convert_peft_adapter_state_dict_for_transformers` (0.21)."""
        stored = f"{key}.lora_A.weight"
        name = re.sub(r"(lora_[^.]*)", r"\1.default", stored, count=1)
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        name = "".join(name.rsplit(".default", 1))
        if f"base_model.model.{stored}".endswith(name):  # only a prefix was taken away: PEFT undoes
            return key
        return name.removesuffix(".lora_A.weight")
