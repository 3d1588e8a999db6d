"""Buffers: rotary frequencies, positions, balancing biases, running statistics."""

import torch
from torch import Tensor

from trainer.session import Session
from trainer.verification.reference import Reference, plain_model, submodule


@torch.no_grad()
def check_buffers(session: Session, reference: Reference) -> str | None:
    """The first buffer that is unset, not finite, or not what the unmodified model has; or None."""
    doubtful = {}
    for name, expected in reference.buffers():
        owner, _, attribute = name.rpartition(".")
        module, _ = submodule(session.model, owner)
        found = getattr(module, attribute, None)
        if not isinstance(found, Tensor) or found.is_meta:
            return f"{name}: a buffer that was never filled"
        if not _same(found, expected):
            doubtful[name] = found, expected
    if doubtful:
        drawn = _drawn_at_random(session)
        for name, (found, expected) in doubtful.items():
            if name not in drawn:
                return (
                    f"{name}: this buffer differs from the unmodified model's (first values "
                    f"{_first(found)}, not {_first(expected)})"
                )
    for name, buffer in session.model.named_buffers():
        if buffer.is_meta:
            return f"{name}: a buffer that was never filled"
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            return f"{name}: a buffer with values that are not numbers"
    return None


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point() or not expected.is_floating_point():
        return torch.equal(found, expected.to(found))
    coarse = max(torch.finfo(t.dtype).eps for t in (found, expected))
    a, b = found.double(), expected.double()
    return torch.allclose(a, b, rtol=4 * coarse, atol=1e-12, equal_nan=True)


def _drawn_at_random(session: Session) -> set[str]:
    """Buffers to which two constructions of the model give different values."""
    first, second = (dict(plain_model(session).named_buffers()) for _ in range(2))
    return {name for name in first if not _same(first[name], second[name])}


def _first(buffer: Tensor) -> str:
    values = buffer.flatten()[:3].tolist()
    return ", ".join(f"{value:.4g}" for value in values) or "none"
