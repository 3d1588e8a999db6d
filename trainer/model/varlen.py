"""Attention within documents, without a mask: flash attention for variable lengths.

Queries (T, H, D), keys and values (T, H_kv, D) of all documents lie end to end; document i is
[boundaries[i], boundaries[i+1]). Query t attends to the last `window` keys of its document up to
itself (0: to all of them; `BOTH_WAYS`: to all keys of its document), and with sinks to one more key
per head, of logit s and value 0:

    P = exp(S − L),   L = log(Σ exp(S) + exp(s)),   O = P V

Without the sink the kernel returns O₀ and L₀, and then L = log(exp(L₀) + exp(s)) and
O = exp(L₀ − L) O₀. Its backward computes dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)) with P = exp(S − L)
from the O and L that it is given, so that these make it exact; ds = −Σ exp(s − L) rowsum(dO ∘ O).
"""

from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD = 256
"""Of the flash kernel; a multiple of 8."""
BOTH_WAYS = -1
"""In place of a window: attention to the whole document."""


@torch.library.custom_op("rankcast_attention::varlen", mutates_args=())
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    boundaries: Tensor,
    longest: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """O (T, H, D) and L (H, T) in float32. `sinks`: (H); `boundaries`: int32; `longest`: at least
    the length of the longest document."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    forward = _flash_forward if query.is_cuda else _forward
    out, lse = forward(query, key, value, boundaries, longest, window, scale)
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.float().unsqueeze(1))
    return (out * (lse - total).exp().T.unsqueeze(2)).to(out.dtype), total


@varlen_attention.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return query.new_empty(query.shape), lse


@torch.library.custom_op("rankcast_attention::varlen_backward", mutates_args=())
def varlen_attention_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; O and L may include sinks."""
    dout, query, key, value = (t.contiguous() for t in (dout, query, key, value))
    backward = _flash_backward if query.is_cuda else _backward_of_documents
    return backward(dout, query, key, value, out, lse, boundaries, longest, window, scale)


@varlen_attention_backward.register_fake
def _(dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, sinks, boundaries, ctx.longest, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, sinks, boundaries, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    assert dlse is None, "L is saved for backward only"
    query, key, value, sinks, boundaries, out, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 8
    dq, dk, dv = varlen_attention_backward(
        dout, query, key, value, out, lse, boundaries, ctx.longest, ctx.window, ctx.scale
    )
    dsinks = None
    if sinks is not None and ctx.needs_input_grad[3]:
        share = (sinks.float().unsqueeze(1) - lse).exp()  # (H, T)
        dsinks = -(share * (dout.float() * out.float()).sum(2).T).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks, None, None, None, None


varlen_attention.register_autograd(_backward, setup_context=_save)


def flash_window(window: int) -> tuple[bool, int, int]:
    """(causal, keys to the left, keys to the right) as flash attention counts them: beside the
    query's own, −1 for no limit. With a limit, causality is the right one's."""
    if window == BOTH_WAYS:
        return False, -1, -1
    return (True, -1, 0) if window == 0 else (False, window - 1, 0)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    causal, left, right = flash_window(window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, boundaries, boundaries, longest, longest, 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out, lse


def _flash_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    boundaries: Tensor, longest: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    causal, left, right = flash_window(window)
    random = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which is 0
    return torch.ops.aten._flash_attention_backward(
        dout, query, key, value, out, lse, boundaries, boundaries, longest, longest, 0.0, causal,
        random, torch.empty(0, device=query.device),
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


# On a CPU, document by document: for tests of all that surrounds the kernel.


def document_scores(query: Tensor, key: Tensor, window: int, scale: float) -> Tensor:
    """Scaled scores (H, n, n) of one document; −inf where a query does not attend."""
    groups = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(groups, 1)).float() * scale
    if window == BOTH_WAYS:
        return scores
    position = torch.arange(len(query))
    distance = position.unsqueeze(1) - position
    seen = (distance >= 0) & (distance < (window or len(query)))
    return scores.masked_fill(~seen, -torch.inf)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    groups = query.shape[1] // key.shape[1]
    for start, end in boundaries.unfold(0, 2, 1).tolist():
        assert end - start <= longest
        scores = document_scores(query[start:end], key[start:end], window, scale)
        lse[:, start:end] = scores.logsumexp(2)
        p = scores.softmax(2).to(value.dtype)
        own = value[start:end].repeat_interleave(groups, 1)
        out[start:end] = torch.einsum("hqk,khd->qhd", p, own)
    return out, lse


def _backward_of_documents(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    boundaries: Tensor, longest: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    for start, end in boundaries.unfold(0, 2, 1).tolist():
        part = slice(start, end)
        q, k, v, dy, y = query[part], key[part], value[part], dout[part], out[part]
        p = (document_scores(q, k, window, scale) - lse[:, part].unsqueeze(2)).exp()
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        dp = torch.einsum("qhd,khd->hqk", dy, v).float()
        ds = (p * (dp - (dy * y).sum(2).T.unsqueeze(2)) * scale).to(q.dtype)
        dq[part] = torch.einsum("hqk,khd->qhd", ds, k)
        for sums, left, right in ((dk, ds, q), (dv, p.to(q.dtype), dy)):
            found = torch.einsum("hqk,qhd->khd", left, right)
            sums[part] = found.unflatten(1, (heads, groups)).sum(2)
    return dq, dk, dv
