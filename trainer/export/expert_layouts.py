"""How the published files of a mixture name the matrices of its experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.expert_export import ExpertLayout
from adapters.layers.base import PackedLayer
from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_PATTERN = frozenset("^$()[]|+?{}")
"""Marks a regular expression, not a name."""
_MERGES = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
_CONVERTED = ("gate_up_proj", "down_proj")
"""The stacks whose experts PEFT converts while it loads."""


def chosen_layouts(
    model: "PreTrainedModel", experts: str | None = None
) -> Mapping[str, ExpertLayout]:
    """Layouts of the stacks to export expert by expert; `experts`: `per_expert`, `stacked`, or None
    for the first where the files hold every expert by itself. Raises UserError where they do not,
    but `per_expert` was asked for."""
    layouts = {} if experts == "stacked" else expert_layouts(model)
    if experts == "per_expert" and not layouts:
        raise UserError(
            f"--experts: per_expert given, but the files of {type(model).__name__} hold no expert "
            "by itself; accepted: stacked"
        )
    return layouts


def expert_layouts(model: "PreTrainedModel") -> dict[str, ExpertLayout]:
    """The layout of every stack whose experts the files hold one by one, by the stack's path, from
    transformers' table of conversions."""
    merged, renamed = _conversions(model.config.model_type)
    layouts, others = {}, set()
    for path, layer in model.named_modules():
        if not (isinstance(layer, PackedLayer) and layer.stacked):
            continue
        target = next((target for target in merged if path.endswith(target)), None)
        if target is None:
            others.add(path.rpartition(".")[0])
            continue
        start = path.removesuffix(target)
        for source, new in reversed(renamed):  # such as Mixtral's `block_sparse_moe`
            start = f"{start}.".replace(new, source).removesuffix(".")
        experts, out_features, in_features = layer.shape
        names = [
            [start + part.replace("*", str(expert)) for part in merged[target]]
            for expert in range(experts)
        ]
        layouts[path] = ExpertLayout(out_features, in_features, names)
    return {  # a mixture as a whole, or not at all
        path: layout for path, layout in layouts.items() if path.rpartition(".")[0] not in others
    }


def _conversions(model_type: str) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """(the modules `….*.w1` that are stacked, by stack; renamings (in the files, in memory))."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    merged: dict[str, list[str]] = {}
    renamed = []
    for conversion in get_checkpoint_conversion_mapping(model_type) or []:
        sources = [source.replace("\\.", ".") for source in conversion.source_patterns]
        targets = [target.replace("\\.", ".") for target in conversion.target_patterns]
        steps = [type(step).__name__ for step in getattr(conversion, "operations", [])]
        if len(targets) != 1 or _PATTERN & set("".join([*sources, *targets])):
            continue
        if steps in _MERGES and targets[0].endswith(_CONVERTED):
            merged[targets[0]] = [source.removesuffix(".weight") for source in sources]
        elif not steps and len(sources) == 1:
            renamed.append((sources[0], targets[0]))
    return merged, renamed
