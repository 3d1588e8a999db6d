"""How a model attends: by document where rows are packed on a GPU, else as transformers does.

A dense mask makes attention run over all pairs of positions of a row. `varlen` runs over those of
one document only. `register_attention` makes it known to transformers as an attention of its own,
so that no model code is changed. In place of a mask its mask function returns *spans*, an int32
tensor that says where documents begin; models hand it to their blocks like any mask, so that
compiled and recomputed blocks get it as an argument. Rows of a single document have no mask and
keep the causal kernel of scaled_dot_product_attention.

Spans are boundaries (n + 1) expanded, without memory, to (1, window + 1, longest, n + 1): integers
that the kernel needs on the host are sizes, which a compiled program takes without recompiling. The
first size is 2 where queries attend to all of their document, the keys behind them too (encoders).
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adapters.units import transformer_blocks
from trainer.errors import UserError
from trainer.model.varlen import BOTH_WAYS, LARGEST_HEAD, varlen_attention
from trainer.model.varlen_dropout import varlen_attention_with_dropout
from trainer.tasks.documents import MASKS, Documents, MaskFunction

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

OURS = ("auto", "varlen")
"""Values of `model.attention` that are decided here."""
VARLEN = "rankcast_varlen"
"""Name under which transformers knows `varlen`; none of its own families' names is part of it."""

_OLDEST = (8, 0)
"""Compute capability that torch's flash attention needs."""
_SEPARABLE = {"full_attention", "sliding_attention"}
"""Kinds of layers that are causal attention, within a window or not."""
_WITHOUT_EFFECT = {"position_ids", "cache_position", "position_embeddings"}
"""Tensors that models hand to any attention; they were used before."""


@dataclass(frozen=True)
class Attention:
    """The attention of a model, and why, for the log."""

    name: str | None
    """transformers' name of it; None: what the model has."""
    reason: str
    obstacle: str | None = None
    """Why packed rows get a dense mask, where they do for want of a kernel."""

    @property
    def by_document(self) -> bool:
        """Whether it runs over the documents of a single row, without a dense mask."""
        return self.name == VARLEN or self.reason == "flash_attention_2"


def register_attention() -> None:
    """Let transformers build models with `VARLEN`, and packed rows get its spans."""
    AttentionInterface.register(VARLEN, varlen_forward)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)  # for rows of single documents
    MASKS[VARLEN] = spans_mask


def choose_attention(
    model: "PreTrainedModel", asked: str, *, packing: bool, device: torch.device, dtype: torch.dtype
) -> Attention:
    """The attention for `model.attention: asked`. Raises UserError where `varlen` cannot serve."""
    if asked not in OURS:
        return Attention(None, asked)
    name, own = None, f"transformers' {model.config._attn_implementation}"
    if model.config._attn_implementation == "sdpa" and _soft_cap(model) is not None:
        name, own = "eager", "eager, as sdpa leaves the soft cap of scores out"  # transformers 5.17
    obstacle = _obstacle(model, device, dtype)
    if asked == "varlen":
        if obstacle is not None:
            raise UserError(f"model.attention: varlen given, but {obstacle}; accepted: auto")
        return Attention(VARLEN, "varlen")
    if not packing:
        return Attention(name, own)
    if obstacle is not None:
        return Attention(name, f"{own}, with a dense mask of documents: {obstacle}", obstacle)
    if _soft_cap(model) is None:
        return Attention(VARLEN, "varlen (flash attention by document)")
    return Attention(name, f"{own}, with a dense mask of documents: scores have a soft cap")


def _obstacle(model: "PreTrainedModel", device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention by document cannot serve, if so."""
    if (lacking := _no_kernel(device)) is not None:
        return lacking
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels are for 16 bits, not {str(dtype).removeprefix('torch.')}"
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} also attends from one row to another"
    if not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return f"{name} has an attention of its own"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _SEPARABLE
    if kinds:
        return f"{name} has layers of kind {', '.join(sorted(kinds))}"
    blocks = [block for _, block in transformer_blocks(model)]
    inside: set[Any] = {type(module) for block in blocks for module in block.modules()}
    calculating = sorted(kind.__name__ for kind in inside if _calculates_with_masks(kind))
    return (
        f"{', '.join(calculating)} calculates with the mask, or hides whether it does"
        if calculating
        else None
    )


def _no_kernel(device: torch.device) -> str | None:
    """Why the device cannot run flash attention, if so."""
    if device.type != "cuda" or torch.version.hip is not None:
        system = "ROCm" if device.type == "cuda" else device.type
        return f"on {system} there is no kernel for it"
    if not torch.cuda.is_available():  # an estimate for another machine
        return None
    found = torch.cuda.get_device_capability(device)
    if found < _OLDEST:
        return (
            f"this GPU has compute capability {found[0]}.{found[1]}, and its kernels need "
            f"{_OLDEST[0]}.{_OLDEST[1]}"
        )
    return None


@functools.cache
def _calculates_with_masks(kind: type[nn.Module]) -> bool:
    """Whether a layer's methods do more with `attention_mask` than to hand it on or compare it with
    None. Read from its source, as no attribute has it; True where there is none to read. Spans are
    no mask to calculate with."""
    if kind.__module__.startswith("torch."):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # no source at hand
        return True
    handed_on = (ast.Call, ast.keyword, ast.Compare, ast.Dict, ast.IfExp, ast.Assign)
    return any(
        isinstance(child, ast.Name) and child.id == "attention_mask"
        for node in ast.walk(tree)
        if not isinstance(node, handed_on)
        for child in ast.iter_child_nodes(node)
    )


def _soft_cap(model: "PreTrainedModel") -> float | None:
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None)


@contextmanager
def with_cache(model: "PreTrainedModel") -> Iterator[None]:
    """Context in which the model attends to a cache of keys, which spans do not describe."""
    config, name = model.config, model.config._attn_implementation
    if name != VARLEN:
        yield
        return
    plain = model._supports_sdpa and _soft_cap(model) is None
    config._attn_implementation = "sdpa" if plain else "eager"
    try:
        yield
    finally:
        config._attn_implementation = name


def spans_mask(
    documents: Documents, *, mask_function: MaskFunction, use_vmap: bool = False, **arguments: Any
) -> Tensor:
    """Spans of the documents; a dense mask where the model asks for anything but causal attention
    or attention to everything, such as a prefix that sees all of itself."""
    window = None
    if not use_vmap and arguments.get("attention_mask") is None:
        window = attended_window(mask_function, documents.positions.shape[1])
    if window is None:
        separate = documents.separate(mask_function)
        dense = sdpa_mask(mask_function=separate, use_vmap=use_vmap, **arguments)
        assert dense is not None
        return dense
    n = len(documents.boundaries)
    if window == BOTH_WAYS:
        return documents.boundaries.expand(2, 1, documents.longest, n)
    return documents.boundaries.expand(1, window + 1, documents.longest, n)


def attended_window(attends: MaskFunction, length: int) -> int | None:
    """Number of keys, its own the last, that a query attends to: 0 for all up to its own,
    `BOTH_WAYS` for all, None if this is not the pattern. `attends` is evaluated for four queries on
    the CPU, without waiting for a GPU."""
    with unset_fake_temporarily(), torch.device("cpu"):  # values matter, also for an estimate
        queries = torch.tensor([0, length // 3, length // 2, length - 1]).view(1, 1, -1, 1)
        keys, zero = torch.arange(length).view(1, 1, 1, -1), torch.zeros(1, 1, 1, 1).long()
        seen = attends(zero, zero, queries, keys).expand(1, 1, 4, length)
        if bool(seen.all()) and length > 1:
            return BOTH_WAYS
        window = int(seen[0, 0, -1].sum())
        expected = (keys <= queries) & (keys > queries - window)
        if not torch.equal(seen, expected):
            return None
        return 0 if window == length else window


def varlen_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of queries (rows, H, length, D) to keys and values (rows, H_kv, length, D):
    (rows, length, H, D). By spans where the mask is those, else by scaled_dot_product_attention,
    or step by step what neither can do. `s_aux`: sinks."""
    unknown = [k for k, v in others.items() if isinstance(v, Tensor) and k not in _WITHOUT_EFFECT]
    if unknown:
        raise UserError(
            f"model.attention: varlen, but {type(module).__name__} also attends by "
            f"{', '.join(unknown)}; accepted: sdpa or eager"
        )
    size = query.shape[-1]
    scale = size**-0.5 if scaling is None else scaling
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = softcap is None and position_bias is None
    plain = plain and size % 8 == 0 and value.shape[-1] <= size <= LARGEST_HEAD
    beyond_sdpa = softcap is not None or s_aux is not None
    if attention_mask is None and causal and beyond_sdpa:
        attention_mask = spans_of_rows(query.shape[0], query.shape[2], query.device)
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        if plain and not (dropout and s_aux is not None):
            return _by_spans(query, key, value, attention_mask, s_aux, scale, dropout), None
        attention_mask = dense_mask(attention_mask, query.shape[0], query.shape[2])
    if not beyond_sdpa:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            is_causal=causal, position_bias=position_bias,
        )  # fmt: skip
        return output, None
    if position_bias is not None:
        raise UserError(
            f"model.attention: varlen, but {type(module).__name__} has a position bias beside a "
            "soft cap or sinks; accepted: eager"
        )
    return _step_by_step(query, key, value, attention_mask, scale, dropout, softcap, s_aux), None


def _both_ways(spans: Tensor) -> bool:
    return spans.shape[0] == 2


def _by_spans(
    query: Tensor, key: Tensor, value: Tensor, spans: Tensor, sinks: Tensor | None, scale: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    rows, heads, length, size = query.shape
    value_size = value.shape[-1]
    if value_size < size:  # latent attention
        value = nn.functional.pad(value, (0, size - value_size))
    q, k, v = (t.transpose(1, 2).reshape(rows * length, -1, size) for t in (query, key, value))
    window = BOTH_WAYS if _both_ways(spans) else spans.shape[1] - 1
    longest = spans.shape[2]
    # Norms kept in float32 may leave q and k in it, which the kernel would refuse.
    q, k, boundaries = q.to(v.dtype), k.to(v.dtype), spans[0, 0, 0]
    if dropout:
        out, *_ = varlen_attention_with_dropout(
            q, k, v, boundaries, longest, window, scale, dropout
        )
    else:
        out, _ = varlen_attention(q, k, v, sinks, boundaries, longest, window, scale)
    return out.view(rows, length, heads, size)[..., :value_size]


def spans_of_rows(rows: int, length: int, device: torch.device) -> Tensor:
    """Spans of rows of one document each."""
    boundaries = torch.arange(rows + 1, dtype=torch.int32, device=device) * length
    return boundaries.expand(1, 1, length, rows + 1)


def dense_mask(spans: Tensor, rows: int, length: int) -> Tensor:
    """The boolean mask (rows, 1, length, length) that spans stand for."""
    tokens = torch.arange(rows * length, device=spans.device)
    boundaries = spans[0, 0, 0].contiguous()
    index = torch.searchsorted(boundaries, tokens, right=True).view(rows, length)
    distance = tokens[:length].unsqueeze(1) - tokens[:length]
    seen = torch.ones_like(distance, dtype=torch.bool) if _both_ways(spans) else distance >= 0
    if spans.shape[1] > 1:
        seen = seen & (distance < spans.shape[1] - 1)
    return (seen & (index.unsqueeze(2) == index.unsqueeze(1))).unsqueeze(1)


def _step_by_step(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float,
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention with all scores in memory."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    p = scores.softmax(3)[..., : key.shape[2]].to(value.dtype)
    return (nn.functional.dropout(p, dropout) @ value).transpose(1, 2).contiguous()
