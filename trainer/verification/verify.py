"""The proof before the first step: what is loaded computes what the unmodified model computes."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers

from trainer import __version__
from trainer.device_memory import release
from trainer.distributed.failures import (
    FailedElsewhere,
    also_failing,
    exit_code,
    is_lost_connection,
)
from trainer.errors import UserError, first_line
from trainer.model.backbone import class_name
from trainer.session import Session
from trainer.tasks.base import Example
from trainer.verification.buffers import check_buffers
from trainer.verification.examples import check_tokens, examples
from trainer.verification.forward import arrangements, check_forward
from trainer.verification.parameters import check_gathered
from trainer.verification.reference import Reference

Conditions = dict[str, str | int]


@dataclass(frozen=True)
class Proof:
    """What was proved, for the log."""

    line: str
    complete: bool
    """Whether everything was compared."""


def conditions(session: Session) -> Conditions:
    """What a proof depends on, beside what the checkpoint fixes anyway (backbone, format, data)."""
    return {
        "rankcast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "engine": session.engine.kind,
        "world_size": session.world.size,
        "device": session.world.device.type,
        "dtype": str(session.backbone.dtype),
        "attention": session.backbone.attention,
    }


def verify_session(session: Session) -> Proof:
    """Check tokens, parameters, adapters' operators, buffers and the forward pass on the run's own
    records. Leaves no trace: random generators, adapters and optimizer are as before. Collective.
    Raises UserError naming the module and the cause."""
    started = time.perf_counter()
    world = session.world
    lacking: list[str] = []
    with session.watchdog, _same_random_numbers(world.device), _without_dropout(session):
        with world.all_or_none():
            check_tokens(session)
            reference = Reference(session)
            proof = examples(session)
            against = [f"{class_name(session.model)} of transformers"]
        compared = [
            _agree(session, "parameters and adapters' operators", check_gathered, lacking),
            _agree(session, "buffers", lambda one: check_buffers(one, reference), lacking),
            _agree(
                session, "the forward pass",
                lambda one: check_forward(one, reference, proof, against), lacking,
            ),
        ]  # fmt: skip
    lengths = " and ".join(str(len(example.input_ids)) for example in proof)
    together = " and ".join(arrangements(session, proof))
    said = [
        f"{len(session.backbone.probes)} tensors as loaded, {len(session.method.adapters)} "
        "adapters' operators",
        "buffers",
        f"the forward pass of {lengths} tokens {together} against {against[-1]}",
    ]
    said = [part for part, done in zip(said, compared, strict=True) if done] or ["nothing"]
    line = ", ".join(said) + f", in {time.perf_counter() - started:.1f} s"
    unreached = longer_windows(session.backbone.model.config, proof)
    return Proof("; ".join([line, *lacking, *unreached]), not lacking and len(against) == 1)


_WINDOW = re.compile(r"(window|window_size|chunk_size)$")
"""Names of a configuration's keys that limit how far layers look back, in tokens."""


def longer_windows(config: transformers.PretrainedConfig, proof: Sequence[Example]) -> list[str]:
    """The windows and chunks of attention that no record of the proof reaches."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds == {"full_attention"}:
        return []
    longest = max(len(example.input_ids) for example in proof)
    found = {name: size for name, size in text.to_dict().items() if _WINDOW.search(name)}
    return [
        f"{name} of {size} not reached"
        for name, size in sorted(found.items())
        if type(size) is int and size >= longest
    ]


def _agree(
    session: Session, what: str, check: Callable[[Session], str | None], lacking: list[str]
) -> bool:
    """Run a check, which may be collective, and fail on every rank if it fails on one. Returns
    whether there was memory for it; else `lacking` gets a remark."""
    session.watchdog.alive(f"the proof of {what}")
    fault = None
    try:
        fault = check(session)
    except Exception as error:
        _end_or_go_on(session, what, error)
        lacking.append(f"{what} not compared: out of memory")
        return False
    with session.world.all_or_none():
        if fault is not None:
            raise UserError(
                f"{fault}; a fault of this program or of a library it uses: nothing was trained "
                "(run.verify=off trains regardless)"
            )
    return True


def _end_or_go_on(session: Session, what: str, error: Exception) -> None:
    """After an error of a check: return if all ranks ran out of memory, between two gathers of the
    backbone; else raise, on the lowest rank that fails its own error. No rank waits for one that
    did not fail, and may be in a collective."""
    world = session.world
    if is_lost_connection(error):
        raise error
    is_short = isinstance(error, torch.OutOfMemoryError)
    failing = also_failing(f"{what}/{'memory' if is_short else 'error'}", world.rank, world.size)
    # What a gather of several ranks leaves behind when it is cut off is not known.
    is_whole = world.size == 1 or not session.engine.collective_gather
    if is_short and is_whole and len(failing) == world.size:
        release(world.device)
        return
    if min(failing) < world.rank:
        raise FailedElsewhere(exit_code(error)) from error
    if is_short:
        raise _short(session, what, error) from error
    raise error


def _short(session: Session, what: str, error: Exception) -> UserError:
    return UserError(
        f"run.verify: {session.config.run.verify} given, but GPU memory ran out in the proof of "
        f"{what}: {first_line(error)}; accepted: off, or more free memory"
    )


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Context that leaves torch's random generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _without_dropout(session: Session) -> Iterator[None]:
    was_training = session.model.training
    session.model.eval()
    try:
        yield
    finally:
        session.model.train(was_training)
