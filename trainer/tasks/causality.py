"""Whether the tokens of a model attend to later ones."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def attends_ahead(model: "PreTrainedModel") -> bool:
    """By the flags that transformers' own modules carry.

    The configuration's `is_decoder` alone does not tell: it is False by default for GPT-NeoX too,
    which never asks for it. The modules of encoders that may become decoders (BERT and its kin)
    hold it. XLM's hold `causal`, XLNet's `attn_type`.
    """
    found = {
        flag: {vars(module).get(flag) for module in model.modules()} - {None}
        for flag in ("is_decoder", "causal", "attn_type")
    }
    is_encoder = getattr(model.config, "is_decoder", None) is False
    return (
        (is_encoder and found["is_decoder"] == {False})
        or found["causal"] == {False}
        or found["attn_type"] == {"bi"}
    )
