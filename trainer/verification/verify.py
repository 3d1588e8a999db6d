"""The proof before the first step: what is loaded computes what the unmodified model computes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from trainer.errors import UserError, first_line
from trainer.session import Session
from trainer.verification.buffers import check_buffers
from trainer.verification.examples import check_tokens, examples
from trainer.verification.forward import arrangements, check_forward
from trainer.verification.parameters import check_gathered
from trainer.verification.reference import Reference


def verify_session(session: Session) -> str:
    """Check tokens, parameters, adapters' operators, buffers and the forward pass on the run's own
    records. Returns a line for the log. Leaves no trace: random generators, adapters and optimizer
    are as before. Collective. Raises UserError naming the module and the cause."""
    started = time.perf_counter()
    world = session.world
    with _same_random_numbers(world.device), _without_dropout(session):
        with world.all_or_none():
            check_tokens(session)
            reference = Reference(session)
            proof = examples(session)
            remarks: list[str] = []
        _agree(session, check_gathered)
        _agree(session, lambda session: check_buffers(session, reference))
        _agree(session, lambda session: check_forward(session, reference, proof, remarks))
    lengths = " and ".join(str(len(example.input_ids)) for example in proof)
    together = " and ".join(arrangements(session, proof))
    seconds = time.perf_counter() - started
    parts = [
        f"{len(session.backbone.probes)} tensors as loaded, {len(session.method.adapters)} "
        f"adapters' operators, buffers, and the forward pass of {lengths} tokens {together} "
        f"against {type(session.model).__name__} of transformers, in {seconds:.1f} s",
        *remarks,
    ]
    return f"verified  {'; '.join(parts)}"


def _agree(session: Session, check: Callable[[Session], str | None]) -> None:
    """Run a check, which may be collective, and fail on every rank if it fails on one."""
    fault, refusal = None, None
    try:
        fault = check(session)
    except UserError as error:  # on every rank; one of them reports it
        refusal = error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's forward raises whatever its records lead to
        fault = f"{type(session.model).__name__} cannot compute these records: {first_line(error)}"
    with session.world.all_or_none():
        if refusal is not None:
            raise refusal
        if fault is not None:
            raise UserError(
                f"{fault}; a fault of this program or of a library it uses: nothing was trained "
                "(run.verify=off trains regardless)"
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
