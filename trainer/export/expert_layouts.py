"""How the published files of a mixture name the matrices of its experts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapters.expert_export import ExpertLayout
from adapters.layers.base import PackedLayer
from trainer.errors import UserError
from trainer.loading.key_mapping import KeyMapping

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


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
    """The layout of every stack whose experts the files hold one by one, by the stack's path."""
    mapping = KeyMapping(model.config)
    layouts = {}
    for path, layer in model.named_modules():
        if not (isinstance(layer, PackedLayer) and layer.stacked):
            continue
        experts, out_features, in_features = layer.shape
        names = [
            # The last alias is the name in the files, such as Mixtral's `block_sparse_moe`.
            [aliases[-1].removesuffix(".weight") for aliases in mapping.expert_parts(path, expert)]
            for expert in range(experts)
        ]
        if names[0]:
            layouts[path] = ExpertLayout(out_features, in_features, names)
    return layouts
