"""Two results of forward passes: where the first difference lies that rounding does not explain.

How far is too far: float32 leaves 1e-6 or so (sums in another order), bfloat16 some percent after
many blocks. So in bfloat16 the reference runs a second time, in float32, and the run's model may be
`_NOISE` times as far from the bfloat16 reference as that is from the float32 one. Both are measured
token by token, and compared by what nine tokens of ten stay below and by the largest; the latter
not where a router chooses experts, since a token that gets another one is another token. A leak
between records, a wrong mask or wrong frequencies change hidden states by tens of percent.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.formats.formats import FORMATS
from adapters.units import expert_counts
from trainer.session import Session
from trainer.verification.calls import relative_error, token_errors, typical

_NOISE = 4.0
_UNMEASURED = 5.0
"""Times the tolerance where there is no memory to measure the noise of 16 bits."""
_LARGEST = 10.0
"""Times the tolerance that the error of a single token may reach."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors of hidden states and of the loss that are no fault."""

    hidden: float
    loss: float

    @staticmethod
    def of(session: Session, *, measured: bool = True) -> "Tolerance":
        """By dtype and weight format: products of a format may round their operands as well.
        `measured`: whether the noise of 16 bits is known beside it."""
        if session.backbone.dtype == torch.float32:
            return Tolerance(1e-3, 1e-5)
        rounding = FORMATS[session.config.model.quantization].product_error(session.world.device)
        times = 1.0 if measured else _UNMEASURED
        return Tolerance(0.02 * times + 4 * rounding, 0.02 + rounding)


@dataclass(frozen=True)
class Result:
    """What a model computed for each record: hidden states (tokens, width) after every block, None
    where they have another form; and the loss, or the record's logits."""

    paths: list[str]
    hidden: list[list[Tensor | None]]
    """By block, then by record."""
    loss: float | None
    logits: list[Tensor]


@dataclass(frozen=True)
class Fault:
    """A difference that rounding does not explain."""

    text: str
    path: str | None = None
    """The first block after which a record's hidden states differ."""
    record: int = 0
    allowed: float = 0.0
    """The relative error of a token that rounding explains there."""


def find_fault(
    session: Session, found: Result, expected: Result, exact: Result | None
) -> Fault | None:
    """The first difference beyond the tolerance. `exact`: the reference in float32."""
    tolerance = Tolerance.of(session, measured=exact is not None)
    chooses = bool(expert_counts(session.model))
    if found.paths == expected.paths:
        for number, path in enumerate(found.paths):
            for record, (a, b) in enumerate(
                zip(found.hidden[number], expected.hidden[number], strict=True)
            ):
                if a is None or b is None:
                    continue
                noise = None if exact is None else exact.hidden[number][record]
                fault = _of_tokens(path, record, (a, b, noise), tolerance.hidden, chooses=chooses)
                if fault is not None:
                    return fault
    if found.loss is not None and expected.loss is not None:
        return _of_losses(found.loss, expected.loss, exact, tolerance.loss)
    for record, (a, b) in enumerate(zip(found.logits, expected.logits, strict=True)):
        allowed = 10 * tolerance.hidden  # few numbers, which may nearly cancel
        if exact is not None:
            allowed = max(allowed, _NOISE * relative_error(b, exact.logits[record]))
        if not relative_error(a, b) <= allowed:
            return Fault(f"record {record + 1} of the proof: its logits differ", None, record)
    return None


def _of_tokens(
    path: str,
    record: int,
    states: tuple[Tensor, Tensor, Tensor | None],
    tolerance: float,
    *,
    chooses: bool,
) -> Fault | None:
    """The fault of a record's hidden states (tokens, width) after a block: of the run's model, of
    the reference, and of the reference in float32."""
    found, expected, exact = states
    errors = token_errors(found, expected)
    noise = torch.zeros(1) if exact is None else token_errors(expected, exact)
    allowed = max(tolerance, _NOISE * typical(noise))
    most = math.inf if chooses else max(_LARGEST * tolerance, _NOISE * float(noise.max()))
    error, largest = typical(errors), float(errors.max())
    where = f"record {record + 1} of the proof:"
    if not error <= allowed:
        text = f"{where} relative error {error:.2g} after {path}, at most {allowed:.2g} is rounding"
        return Fault(text, path, record, allowed)
    if not largest <= most:
        token = int(errors.argmax()) + 1
        text = (
            f"{where} relative error {largest:.2g} of token {token} after {path}, at most "
            f"{most:.2g} is rounding"
        )
        return Fault(text, path, record, allowed)
    return None


def _of_losses(
    found: float, expected: float, exact: Result | None, tolerance: float
) -> Fault | None:
    allowed = tolerance
    if exact is not None and exact.loss is not None:
        allowed = max(allowed, _NOISE * abs(expected / exact.loss - 1))
    error = abs(found / expected - 1) if expected else abs(found)
    if error <= allowed:
        return None
    return Fault(
        f"loss {found:.6g}, but {expected:.6g} by the unmodified model on the same weights"
    )
