"""Cross entropy of an output head in chunks of rows, without materialising all logits.

The logits of 4096 tokens over a vocabulary of 128,256 are 1 GiB in bfloat16, and cross entropy
works on float32 copies of twice that size. Here the head is applied to a chunk of rows at a time.
As it is frozen, forward already computes the gradient p W − W_target of a row and saves it (as
large as the hidden states); backward uses neither the head's weight nor the logits. Where the head
has trained rows R of some tokens, these take the place of W's; their p and x are saved for the
gradient pᵀ x.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.token_rows import rows_of
from trainer.tasks.logits import LogitMap, logit_map, neutral

CHUNK = 2**27
"""Logits per chunk: 512 MiB in float32."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy (rows) of x Wᵀ + b; x (rows, in), W (vocabulary, in), targets (rows). `ids`,
    `values` (n, in), float32: tokens, and the rows R that replace theirs in W. `change`: of the
    logits, by the model. `right` (rows) is filled with whether the target is the most likely token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ids: Tensor | None,
        values: Tensor | None,
        change: LogitMap,
        right: Tensor | None,
    ) -> Tensor:
        losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        R = None if values is None else values.to(x.dtype)
        own = None if R is None else x.new_empty(x.shape[0], len(R))  # p of these tokens
        rows = max(1, CHUNK // weight.shape[0])
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(x[part], weight, bias).float()
            if R is not None:
                logits[:, ids] = F.linear(x[part], R).float()
            slope = change.apply_(logits)
            total = logits.logsumexp(1, keepdim=True)
            chosen = targets[part].unsqueeze(1)
            if right is not None:
                right[part] = logits.argmax(1) == targets[part]
            losses[part] = (total - logits.gather(1, chosen)).squeeze(1)
            if dx is not None:
                p = logits.sub_(total).exp_()
                p.scatter_add_(1, chosen, p.new_full(chosen.shape, -1.0))
                if slope is not None:
                    p *= slope
                if own is not None:
                    own[part] = p[:, ids].to(x.dtype)
                    p[:, ids] = 0.0
                dx[part] = p.to(x.dtype) @ weight
        if dx is not None and own is not None and R is not None:
            dx += own @ R
        ctx.save_for_backward(dx, own, None if own is None else x)
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, own, x = ctx.saved_tensors
        scale = dlosses.to(dx.dtype).unsqueeze(1)
        dR = None if own is None else ((own * scale).T @ x).float()
        return dx * scale, None, None, None, None, dR, None, None


def loss_head(model: nn.Module) -> nn.Linear | None:
    """The model's output head if the loss can be computed inside it: a frozen linear layer whose
    output the model returns unchanged, scaled or capped. Else None."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or any(p.requires_grad for p in head.parameters()):
        return None
    return head if logit_map(model) is not None else None


@contextmanager
def loss_inside(
    model: nn.Module,
    head: nn.Linear,
    learned: Tensor | tuple[Tensor, Tensor],
    targets: Tensor,
    right: Tensor | None = None,
) -> Iterator[None]:
    """Within this context the model's head returns, in place of logits, the losses of the `learned`
    positions of (batch, length − 1), a mask or indices, in their order, with these `targets`;
    `right` is filled with whether each target is the most likely token. It runs where the model
    calls the head, when a sharder has gathered its weight."""

    def forward(hidden: Tensor) -> Tensor:
        x, trained = hidden[:, :-1][learned], rows_of(head)
        rows = (None, None) if trained is None else (trained.ids, trained.values)
        given = head.weight, head.bias, targets, *rows, change, right
        losses = _LinearCrossEntropy.apply(x, *given)
        assert isinstance(losses, Tensor)
        return losses

    change = logit_map(model)
    assert change is not None
    own = vars(head).get("forward")  # of a head with trained rows
    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        with neutral(model):
            yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own  # type: ignore[method-assign]
