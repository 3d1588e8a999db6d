"""Cross entropy of an output head in chunks of rows, without materialising all logits.

The logits of 4096 tokens over a vocabulary of 128,256 are 1 GiB in bfloat16, and cross entropy
works on float32 copies of twice that size. Here the head is applied to a chunk of rows at a time.
As it is frozen, forward already computes the gradient p W − W_target of a row and saves it (as
large as the hidden states); backward uses neither the head's weight nor the logits.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**27
"""Logits per chunk: 512 MiB in float32."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy (rows) of x Wᵀ + b; x (rows, in), W (vocabulary, in), targets (rows)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        needed = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needed else None
        rows = max(1, CHUNK // weight.shape[0])
        for start in range(0, x.shape[0], rows):
            part = slice(start, start + rows)
            logits = F.linear(x[part], weight, bias).float()
            total = logits.logsumexp(1, keepdim=True)
            chosen = targets[part].unsqueeze(1)
            losses[part] = (total - logits.gather(1, chosen)).squeeze(1)
            if dx is not None:
                p = logits.sub_(total).exp_()
                p.scatter_add_(1, chosen, p.new_full(chosen.shape, -1.0))
                dx[part] = p.to(x.dtype) @ weight
        ctx.save_for_backward(*([dx] if dx is not None else []))
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (dx,) = ctx.saved_tensors
        return dx * dlosses.to(dx.dtype).unsqueeze(1), None, None, None


def loss_head(model: nn.Module) -> nn.Linear | None:
    """The model's output head if the loss can be computed inside it: a frozen linear layer whose
    output the model returns unchanged. Else None."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or any(p.requires_grad for p in head.parameters()):
        return None
    return head if _returns_head_output(type(model).forward) else None


@functools.cache
def _returns_head_output(forward: Callable[..., Any]) -> bool:
    """Whether a model's `forward` returns the head's output as its logits. Read from its source, as
    no attribute has it (Gemma 2 caps the logits, Granite and Cohere scale them)."""
    source = inspect.getsource(inspect.unwrap(forward))
    made = re.findall(r"^\s*logits = (.*)$", source, re.MULTILINE)
    return len(made) == 1 and re.fullmatch(r"self\.lm_head\(hidden_states.*\)", made[0]) is not None


@contextmanager
def loss_inside(head: nn.Linear, learned: Tensor, targets: Tensor) -> Iterator[None]:
    """Within this context the head returns, in place of logits, the losses of the `learned`
    positions of (batch, length − 1), in their order, with these `targets`. It runs where
    the model calls the head, when a sharder has gathered its weight."""

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden[:, :-1][learned]
        losses = _LinearCrossEntropy.apply(rows, head.weight, head.bias, targets)
        assert isinstance(losses, Tensor)
        return losses

    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del head.forward
