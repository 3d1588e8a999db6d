"""Attention within documents, of which training drops probabilities:

    O = (P ∘ M) V,   M: 1/(1 − p) or, with probability p, 0

with P, documents and windows as in `varlen.py`, without sinks. The kernel draws M from the GPU's
generator and returns the state with which its backward draws it again:

    dV = (P ∘ M)ᵀ dO,   dS = P ∘ (M ∘ (dO Vᵀ) − rowsum(dO ∘ O))
"""

from typing import Any

import torch
from torch import Tensor

from trainer.model.varlen import document_scores, flash_window


@torch.library.custom_op("rankcast_attention::varlen_dropout", mutates_args=())
def varlen_attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """O (T, H, D), L (H, T) in float32, and the state (2) that draws M. Arguments as for
    `varlen_attention`; `dropout`: p."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    if not query.is_cuda:
        return _forward(query, key, value, boundaries, window, scale, dropout)
    causal, left, right = flash_window(window)
    out, lse, state, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, dropout, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse, state


@varlen_attention_with_dropout.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), lse, query.new_empty(2, dtype=torch.uint64)


@torch.library.custom_op("rankcast_attention::varlen_dropout_backward", mutates_args=())
def varlen_dropout_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    state: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dout, query, key, value = (t.contiguous() for t in (dout, query, key, value))
    if not query.is_cuda:
        return _backward_of_documents(
            dout, query, key, value, out, lse, state, boundaries, window, scale, dropout
        )
    causal, left, right = flash_window(window)
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, boundaries, boundaries, longest, longest, dropout,
        causal, state, torch.empty(0, device=query.device),
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


@varlen_dropout_backward.register_fake
def _(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, boundaries, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, *output, boundaries)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 8
    found = varlen_dropout_backward(dout, *ctx.saved_tensors, *ctx.numbers)
    return (*found, *[None] * 5)


varlen_attention_with_dropout.register_autograd(_backward, setup_context=_save)


# On a CPU, document by document: for tests of all that surrounds the kernel.


def kept(state: Tensor, boundaries: Tensor, heads: int, dropout: float) -> list[Tensor]:
    """M (H, n, n) of every document."""
    generator = torch.Generator().manual_seed(int(state.view(torch.int64)[0]))
    lengths = boundaries.diff().tolist()
    drawn = [torch.rand(heads, n, n, generator=generator) for n in lengths]
    return [(values >= dropout) / (1 - dropout) for values in drawn]


def _forward(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, window: int, scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    state = torch.randint(2**62, (2,)).view(torch.uint64)
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    groups = query.shape[1] // key.shape[1]
    masks = kept(state, boundaries, query.shape[1], dropout)
    for (start, end), mask in zip(boundaries.unfold(0, 2, 1).tolist(), masks, strict=True):
        s = document_scores(query[start:end], key[start:end], window, scale)
        lse[:, start:end] = s.logsumexp(2)
        own = value[start:end].repeat_interleave(groups, 1)
        p = (s.softmax(2) * mask).to(value.dtype)
        out[start:end] = torch.einsum("hqk,khd->qhd", p, own)
    return out, lse, state


def _backward_of_documents(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    state: Tensor, boundaries: Tensor, window: int, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    masks = kept(state, boundaries, query.shape[1], dropout)
    for (start, end), mask in zip(boundaries.unfold(0, 2, 1).tolist(), masks, strict=True):
        part = slice(start, end)
        q, k, v, dy, y = query[part], key[part], value[part], dout[part], out[part]
        p = (document_scores(q, k, window, scale) - lse[:, part].unsqueeze(2)).exp()
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        dp = torch.einsum("qhd,khd->hqk", dy, v).float() * mask
        ds = (p * (dp - (dy * y).sum(2).T.unsqueeze(2)) * scale).to(q.dtype)
        dq[part] = torch.einsum("hqk,khd->qhd", ds, k)
        for sums, left, right in ((dk, ds, q), (dv, (p * mask).to(q.dtype), dy)):
            found = torch.einsum("hqk,qhd->khd", left, right)
            sums[part] = found.unflatten(1, (heads, groups)).sum(2)
    return dq, dk, dv
