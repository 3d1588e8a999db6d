"""Model FLOPs of training: what a step has to compute, whatever is computed in fact.

With N entries of the matrices that a token is multiplied with, of a mixture's experts those that a
token takes, a token costs 2 N forward and 2 N for the gradient of its activations; where the
backbone trains, 2 N more for that of the weights. The output head counts at the tokens that are
learned, where its loss is computed. Attention costs 2 (d_k + d_v) for each head and pair of a query
and a key that it sees, forward, and twice that backward: pairs within a document and, where the
layer has one, a window.

Left out: adapters (about r / d of N), routers, norms, activations, the softmax, recurrences of
layers without attention, what is recomputed, padding, unpacking of quantised weights, the
optimizer, and the towers for images and sound, which records of text do not go through. The lowest
layers are counted as if gradients went through their inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from adapters.layers.experts import StackedLinear
from adapters.layers.linear import AdaptedLinear
from trainer.tasks.causality import attends_ahead

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True)
class ModelFlops:
    """What the FLOPs of a step depend on, of a model."""

    matrices: int
    """Entries of the matrices that every token is multiplied with, the output head's not among
    them."""
    head: int
    """Those of the output head."""
    per_pair: int
    """Sum of d_k + d_v over the query heads of a layer."""
    windows: Sequence[int | None]
    """Of every layer with attention; None: it sees the whole document."""
    causal: bool
    trains: bool
    """Whether the backbone trains."""

    def of_step(self, lengths: np.ndarray, learned: int) -> float:
        """FLOPs of documents of `lengths` tokens, `learned` of them with a loss; forward and
        backward."""
        passes = 3 if self.trains else 2
        entries = self.matrices * int(lengths.sum()) + self.head * learned
        pairs = sum(_pairs(lengths, window, causal=self.causal) for window in self.windows)
        return 2.0 * passes * entries + 3 * 2.0 * self.per_pair * pairs


def model_flops(model: "PreTrainedModel", *, trains: bool = False) -> ModelFlops | None:
    """Those of a model, its layers adapted or not; None where the formula does not describe it:
    encoder-decoders, models of images, mixtures that do not say how many experts a token takes."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    matrices = _matrices(model, config, head)
    heads = getattr(config, "num_attention_heads", None)
    of_text = hasattr(config, "vocab_size") and not config.is_encoder_decoder
    windows = _windows(config)
    if matrices is None or windows is None or not of_text or not isinstance(heads, int):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "qk_nope_head_dim", None):  # latent attention
        key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        key = value = width
    return ModelFlops(
        matrices=matrices,
        head=_entries(head),
        per_pair=heads * (key + value),
        windows=windows,
        causal=not attends_ahead(model),
        trains=trains,
    )


def _matrices(model: "PreTrainedModel", config: Any, head: Any) -> int | None:
    """Entries of the matrices but the head's; None where it is not known how many experts a token
    takes, or what a layer does with its parameters."""
    chosen = getattr(config, "num_experts_per_tok", None)
    total = 0
    towers = _towers(model)
    for module in model.modules():
        if module in towers:
            continue
        if _is_other(module, config):
            return None
        if isinstance(module, StackedLinear):
            if not isinstance(chosen, int):
                return None
            total += chosen * module.out_features * module.in_features
        elif module is not head:
            total += _entries(module)
    return total


def _towers(model: "PreTrainedModel") -> set[nn.Module]:
    """The modules that only images or sound go through: beside the decoder of text, below the
    head."""
    if model.config.get_text_config() is model.config:
        return set()
    return set(model.base_model.modules()) - set(model.get_decoder().modules())


def _is_other(module: nn.Module, config: Any) -> bool:
    """Whether a module has a matrix of its own and is no layer that is counted; routers, of a row
    for each expert, are left out."""
    if isinstance(module, nn.Linear | nn.Embedding) or type(module).__module__.startswith(
        "adapters"
    ):
        return False
    experts = {getattr(config, key, None) for key in ("num_experts", "num_local_experts")}
    own = list(module.parameters(recurse=False))
    return any(p.dim() > 2 or (p.dim() == 2 and len(p) not in experts) for p in own)


def _entries(module: Any) -> int:
    """Entries of a linear layer's matrix; 0 of other modules."""
    if not isinstance(module, nn.Linear | AdaptedLinear):
        return 0
    return module.out_features * module.in_features


def _windows(config: Any) -> list[int | None] | None:
    """The window of each layer with attention; None for a kind of attention of which the pairs are
    not known."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        is_used = getattr(config, "use_sliding_window", True)
        return [window if is_used else None] * config.num_hidden_layers
    windows = {"full_attention": None, "attention": None, "sliding_attention": window}
    return [windows[kind] for kind in kinds] if windows.keys() >= set(kinds) else None


def _pairs(lengths: np.ndarray, window: int | None, *, causal: bool) -> int:
    """Pairs of a query and a key that it sees: itself, those before it and, unless causal, those
    behind it, none further away than the window reaches."""
    n = lengths.astype(np.int64)
    w = n if window is None else np.minimum(n, window)
    before = w * (w + 1) // 2 + (n - w) * w
    return int(before.sum()) if causal else int((2 * before - n).sum())
