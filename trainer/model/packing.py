"""Whether a model can keep the documents of a packed row apart, by its structure.

Masks separate documents in attention. Layers that carry a state along the row, or mix neighbouring
positions by a convolution, know no documents. `trainer/verification/forward.py` measures the rest.
"""

from typing import TYPE_CHECKING

from torch import nn
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_recurrent_attention_mask,
)

from adapters.units import transformer_blocks
from trainer.errors import UserError
from trainer.tasks.positions import counts_by_itself

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def check_packing(model: "PreTrainedModel") -> None:
    """Raises UserError where a kind of layer carries something across documents, or where their
    positions cannot restart. Reads no weights."""
    kinds = _carrying_layers(model)
    if kinds:
        raise UserError(
            f"data.packing: true given, but {type(model).__name__} has layers that carry state "
            f"across the documents of a row ({', '.join(kinds)}); accepted: false"
        )
    table = counts_by_itself(model)
    if table is not None:
        raise UserError(
            f"data.packing: true given, but {type(model).__name__} counts the positions of "
            f"{table} by itself, from the start of the row, and takes no position_ids; accepted: "
            "false"
        )


def _carrying_layers(model: "PreTrainedModel") -> list[str]:
    """Kinds of layers that carry state from one position to the next, other than by attention:
    transformers' names of them where the configuration lists its layers, else classes."""
    listed = getattr(model.config.get_text_config(), "layer_types", None) or ()
    kinds = sorted({kind for kind in listed if _is_recurrent(kind)})
    if kinds:
        return kinds
    inside = [module for _, block in transformer_blocks(model) for module in block.modules()]
    mixing = (nn.Conv1d, nn.RNNBase, nn.RNNCellBase)
    kinds = sorted({type(module).__name__ for module in inside if isinstance(module, mixing)})
    return kinds or (["a recurrent state"] if model._is_stateful else [])


def _is_recurrent(kind: str) -> bool:
    """Whether transformers masks layers of this kind as recurrent ones or convolutions."""
    masks = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind)
    made = masks.values() if isinstance(masks, dict) else (masks,)
    return create_recurrent_attention_mask in made
