"""What ranks run: a list of cases, one after the other in one process group.

Forked by `tests/world/cases.py`, or on GPUs

    torchrun --nproc_per_node 2 tests/world/worker.py cases.json results cuda

Each case names a function below and its arguments; what it returns on each rank (or the error it
ended in) is written to results/<rank>.json.
"""

import ctypes
import gc
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from adapters.layers.experts import StackedLinear
from adapters.layers.linear import AdaptedLinear
from adapters.methods.registry import METHODS
from adapters.units import transformer_blocks
from launch import chat
from tests.helpers import lean_runs
from trainer.checkpoint import store
from trainer.checkpoint.saved import read_saved
from trainer.config.config import parse_config
from trainer.distributed import failures, process_group
from trainer.distributed.world import World
from trainer.engine.peer_memory import open_peer_memory
from trainer.engine.sharded_optimizer import ShardedOptimizer
from trainer.errors import UserError
from trainer.generation.generate import generate
from trainer.loading import async_reader
from trainer.loading.assignment import ParamTask
from trainer.loading.materialize import Materializer
from trainer.memory.planner import make_plan
from trainer.run.run import run
from trainer.run.saved_model import open_saved_model
from trainer.session import Session, open_session
from trainer.training.evaluation import evaluate_saved
from trainer.training.loop import make_loader
from trainer.training.starts import find_starts
from trainer.training.step import Training, accumulate, train_step
from trainer.training.validation import make_validate
from trainer.verification.verify import verify_session

MIB = 2**20


def train(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A whole run, as launch/train.py does it, without the curve at its end."""
    run(parse_config(config), world)
    return {}


def train_compiled(world: World, config: dict[str, Any]) -> int:
    """A whole run, whose blocks are compiled (captured and differentiated, but no code made: that
    takes a compiler and minutes) once: a second compilation is an error. Returns the programs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with (
        patch("trainer.model.blocks.BACKEND", "aot_eager"),
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        run(parse_config(config), world)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    assert not breaks, torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def kept_for_backward(world: World, config: dict[str, Any]) -> list[int]:
    """A compiled forward pass: how many linear layers' weights it used, and how many it keeps."""
    torch._dynamo.reset()
    used, saved = [], []
    inner = AdaptedLinear.low_rank

    def low_rank(host: AdaptedLinear, x: torch.Tensor):
        used.append(host.weight.untyped_storage())  # held, so that no other takes its place
        return inner(host, x)

    with patch("trainer.model.blocks.BACKEND", "aot_eager"):
        session = open_session(parse_config(config), world)
        _, batch = next(iter(make_loader(session, world))).micro_batches[0]
        with (
            patch.object(AdaptedLinear, "low_rank", low_rank),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            session.task.loss(session.model, batch)
    weights = {storage.data_ptr() for storage in used if storage.nbytes()}  # FSDP2 empties them
    saved = [t for t in saved if t.untyped_storage().nbytes()]
    layers = [m for m in session.model.modules() if isinstance(m, AdaptedLinear | torch.nn.Linear)]
    shapes = {(host.out_features, host.in_features) for host in layers}
    looks_so = [
        tuple(t.shape) in shapes or t.untyped_storage().data_ptr() in weights for t in saved
    ]
    return [len(used), sum(looks_so)]


def train_on_a_full_disk(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A run whose second rank may write only small files, by a limit of the operating system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        return train(world, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def shard(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """Bytes that the backbone takes: between steps, and between forward and backward."""
    settle()
    before = resident()
    session = open_session(parse_config(config), world)
    loader = make_loader(session, world)
    session.optimizer.zero_grad()
    settle()
    loaded = resident()
    result: dict[str, Any] = {
        "kind": session.engine.kind,
        "local_bytes": session.engine.local_bytes(session.model),
        "resident_after_loading": loaded - before,
    }
    step = next(iter(loader))
    accumulate(session, step, 0)  # the first pass allocates what stays: buffers, traces
    settle()
    _, batch = step.micro_batches[0]
    held = []
    for _ in range(3):  # what is really held shows every time; the least is free of noise
        settle()
        rested = resident()
        loss, _ = session.task.loss(session.model, batch)
        settle()
        after_forward = resident() - rested
        loss.backward()
        del loss
        settle()
        held.append((after_forward, resident() - rested))
    result["held_after_forward"], result["held_after_backward"] = map(min, zip(*held, strict=True))
    return result


def held(world: World, config: dict[str, Any]) -> int:
    """Bytes of weights, gradients and moments that this rank holds of a backbone that trains,
    between two steps: of all storages of floats that are new, each once."""
    before = _storages()
    session = open_session(parse_config(config), world)
    loader = make_loader(session, world)
    train_step(Training(session, loader, 2, make_validate(session)), 0)
    accumulate(session, loader.next_step(), 1)
    return sum(size for key, size in _storages().items() if key not in before)


def not_finite(world: World, config: dict[str, Any]) -> list[Any]:
    """Full fine-tuning in three steps; in the second one the gradient of the last rank's part is
    NaN, though the loss is not. By step: whether it was skipped, and whether values or moments are
    other ones after it, and all finite."""
    session = open_session(parse_config(config), world)
    training = Training(session, make_loader(session, world), 3, make_validate(session))
    optimizer, engine = session.optimizer, session.engine
    assert isinstance(optimizer, ShardedOptimizer)
    backward = engine.backward

    def spoilt(loss: torch.Tensor) -> None:
        backward(loss * (torch.nan if world.rank == world.size - 1 else 1.0))

    def state() -> list[torch.Tensor]:
        found = [optimizer.gathered(name) for name in optimizer.parameters]
        return [t.clone() for one in found for t in (one.value, one.exp_avg, one.exp_avg_sq)]

    result, before = [], state()
    for step, chosen in enumerate((backward, spoilt, backward)):
        with patch.object(engine, "backward", chosen):
            done = train_step(training, step)
        after = state()
        changed = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        finite = all(bool(t.isfinite().all()) for t in after)
        result.append((done.update.skipped, changed, finite, optimizer.steps))
        before = after
    return result


def _storages() -> dict[int, int]:
    """Bytes of every storage of floats by its address."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.is_floating_point() and not one.is_meta:
            local = one.to_local() if isinstance(one, DTensor) else one
            found[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return found


def windows(world: World, nodes: list[list[int]]) -> list[list[int]]:
    """What every rank of this host wrote into its window, as this one reads it."""
    world = replace(world, nodes=tuple(map(tuple, nodes)))
    parts = open_peer_memory(1000, world)
    own = parts[world.nodes[world.node].index(world.rank)]
    own.copy_(torch.arange(1000) % (world.rank + 2))
    world.gather(None)
    return [[int(part.max()), int(part.sum())] for part in parts]


def gathered(world: World, config: dict[str, Any]) -> dict[str, str]:
    """Digest of every quantised matrix, byte by byte, as it is while its block is whole."""
    return _digests(open_session(parse_config(config), world))


def _digests(session: Session) -> dict[str, str]:
    digests = {}
    for path, block in transformer_blocks(session.model):
        with session.engine.unsharded(block):
            for name, host in block.named_modules():
                if isinstance(host, AdaptedLinear | StackedLinear):
                    data = host.weight.detach().cpu().clone().view(torch.uint8)
                    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
                    digests[f"{path}.{name}"] = digest
    return digests


def unsharded_blocks(world: World, config: dict[str, Any]) -> list[dict[str, Any]]:
    """For several numbers of blocks that stay whole, one after the other in one session: bytes of
    the backbone here, the loss of an evaluation, the digest of a step's gradients, and those of
    all matrices."""
    session = open_session(parse_config(config), world)
    step = next(iter(make_loader(session, world)))
    engine, found = session.engine, []
    for count in (0, 2, 4, 1, 0):
        engine.keep_unsharded(count)
        for _ in range(2):
            session.optimizer.zero_grad()
            accumulate(session, step, 0)
        gradient = session.optimizer.gradients.numpy().tobytes()
        with torch.no_grad():
            loss, _ = session.task.loss(session.model, step.micro_batches[0][1])
        digests = list(_digests(session).values())
        accumulate(session, step, 0)  # after blocks were taken apart too
        found.append({
            "bytes": engine.local_bytes(session.model), "loss": float(loss), "weights": digests,
            "gradient": hashlib.sha256(gradient).hexdigest(),
        })  # fmt: skip
    return found


def planned(world: World, config: dict[str, Any]) -> list[int]:
    """On a GPU, of the plan: blocks, those that keep their activations, those that stay whole."""
    plan = make_plan(open_session(parse_config(config), world))
    assert plan is not None
    return [plan.blocks, plan.saved, plan.unsharded]


def loaded(world: World, argument: dict[str, Any]) -> dict[str, Any]:
    """Digests of every parameter of a loaded backbone and of what its adapters start as, and which
    bytes of which files this rank has read. `nodes`: as if the ranks were on these hosts; `cut`: a
    file loses its second half meanwhile; `fails_after`: rank 1 can read so many pieces only."""
    if "nodes" in argument:
        world = replace(world, nodes=tuple(map(tuple, argument["nodes"])))
    honest, pieces = async_reader.read_into, []

    def watched(memory: memoryview, file: Path, offset: int) -> None:
        pieces.append((file.name, offset, len(memory)))
        if len(pieces) > argument.get("fails_after", 10**9) and world.rank == 1:
            raise async_reader.unreadable(file, OSError(5, "Input/output error"))
        if "cut" in argument and world.is_main and len(pieces) == 2:
            os.truncate(file, file.stat().st_size // 2)
        honest(memory, file, offset)

    with patch.object(async_reader, "read_into", watched):
        session = open_session(parse_config(argument["config"]), world)
    digests = {}

    def note(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            data = tensor.detach().cpu().clone().flatten().view(torch.uint8)
            digests.setdefault(name, hashlib.sha256(data.numpy().tobytes()).hexdigest())

    blocks = transformer_blocks(session.model)
    inside = tuple(f"{path}." for path, _ in blocks)
    for path, block in blocks:
        with session.engine.unsharded(block):
            note(block.named_parameters(prefix=path))
    with session.engine.unsharded(session.model):
        others = session.model.named_parameters()
        note((name, p) for name, p in others if not name.startswith(inside))
    for name, adapter in session.method.adapters.items():
        note((f"{name}/{role}", getattr(adapter, role)) for role in ("A", "B"))
    figures = session.backbone.loading
    assert figures is not None
    return {
        "digests": digests,
        "pieces": pieces,
        "bytes_read": figures.bytes_read,
        "identity": session.backbone.digest,
        "error": session.backbone.quantization_error,
    }


def started(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A data-driven start: its digest, and A and worth of every third unit."""
    starts = find_starts(open_session(parse_config(config), world))
    digest = hashlib.sha256()
    for name, start in starts.items():
        for tensor in (start.A, start.worth, start.gain):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    some = {name: [start.A.tolist(), start.worth.tolist()] for name, start in starts.items()}
    return {
        "digest": digest.hexdigest(),
        "starts": dict(itertools.islice(some.items(), 0, None, 3)),
    }


def verified(world: World, argument: dict[str, Any]) -> str:
    """The proof's line. `shifted`: rank 0 is one row off in its copy of this matrix; `garbage`: rank
    1 has other rotary frequencies."""
    honest = Materializer.assign_to_model

    def assign(materializer: Materializer, task: ParamTask) -> None:
        honest(materializer, task)
        if task.name == argument.get("shifted") and world.rank == 0:
            weight = task.owner.weight.data
            weight.copy_(weight.view(task.owner.shape[0], -1).roll(1, 0).view_as(weight))

    with patch.object(Materializer, "assign_to_model", assign):
        session = open_session(parse_config(argument["config"]), world)
    if "garbage" in argument and world.rank == 1:
        session.model.model.rotary_emb.inv_freq.mul_(1.5)
    return verify_session(session).line


def train_only(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A whole run but for the export and the figures at its end."""
    with patch("trainer.run.run.finish"):
        return train(world, config)


def resume(world: World, argument: dict[str, Any]) -> dict[str, Any]:
    """Go on from a run that was killed some time after it had saved `step`."""
    if world.is_main:
        target = parse_config(argument["config"]).run_folder
        cut_run(Path(argument["source"]), target, argument["step"])
    world.gather(None)
    return train_only(world, argument["config"])


def cut_run(source: Path, target: Path, step: int) -> None:
    """A copy of a run without the checkpoints after `step`; what was logged since stays."""
    shutil.copytree(source, target)
    for saved in (target / "checkpoints").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)


def go_on(world: World, argument: dict[str, Any]) -> dict[str, Any]:
    """`resume`, to the export. `missed`: the run was stopped before the evaluation of `step`."""
    if world.is_main:
        target, step = parse_config(argument["config"]).run_folder, argument["step"]
        cut_run(Path(argument["source"]), target, step)
        if argument.get("missed"):
            states = [store.of_step(target / "checkpoints", n) for n in (step - 1, step)]
            before, last = (json.loads((path / "state.json").read_text()) for path in states)
            last["best"] = before["best"]
            last["progress"] = {**before["progress"], "step": step}
            (states[1] / "state.json").write_text(json.dumps(last))
            (states[1] / "manifest.json").unlink()
            store.write_manifest(states[1])
    world.gather(None)
    return train(world, argument["config"])


def desynchronised(world: World, argument: dict[str, Any]) -> dict[str, Any]:
    """A run in which rank 1 applies the decision before step `step` wrongly."""
    config, calls = parse_config(argument["config"]), itertools.count()
    kind = METHODS[config.method.kind]
    honest = kind.apply

    def apply(self, decision):
        changed = honest(self, decision)
        if next(calls) == argument["step"] and world.rank == 1:
            name, adapter = next(iter(self.adapters.items()))
            if argument["what"] == "mask":
                adapter.mask[-1] = ~adapter.mask[-1]
            elif argument["what"] == "gate":  # by the least that a float can
                infinity = torch.full_like(adapter.g, torch.inf)
                adapter.g.data[0] = torch.nextafter(adapter.g.data, infinity)[0]
            else:
                self.adapters.remove(name)
        return changed

    with patch.object(kind, "apply", apply):
        return train_only(world, argument["config"])


def masked_steps(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """A few steps by hand: which rows of adapters, moments and counts each one changed.

    `moved`: what changed though its component was not active. `resting`: rows that were not
    active, `with_momentum`: those of them that had been active before.
    """
    session = open_session(parse_config(config), world)
    found: dict[str, Any] = {"moved": [], "resting": 0, "with_momentum": 0, "active": 0, "still": 0}
    for step, before in drive(session):
        after = snapshot(session)
        for key, old in before.items():
            name, part = key.rsplit("/", 1)
            mask = before[f"{name}/mask"]
            changed = (after[key] != old).view(len(mask), -1).any(1)
            if part != "mask":
                found["moved"] += [f"step {step}: {key}"] * bool(changed[~mask].any())
                found["still"] += int((~changed[mask]).sum()) if part in ("A", "B", "step") else 0
            elif f"{name}.A/step" in before:  # once a unit
                found["active"] += int(mask.sum())
                found["resting"] += int((~mask).sum())
                found["with_momentum"] += int((~mask & (before[f"{name}.A/step"] > 0)).sum())
    return found


def moments(world: World, config: dict[str, Any]) -> dict[str, int]:
    """Scalars that this rank's optimizer has in its values and in each of its moments."""
    optimizer = open_session(parse_config(config), world).optimizer
    return {"values": len(optimizer.values), "moments": len(optimizer.exp_avg_sq)}


def drive(session: Session, *, copies: bool = True):
    """The steps of a run, without what the loop adds to them; after each (its number, what was
    before its update, where `copies` are wanted)."""
    steps, validate = session.config.run.steps or 1, make_validate(session)
    training = Training(session, make_loader(session, session.world), steps, validate)
    session.method.set_horizon(steps, lambda step: 1.0)
    session.method.on_train_begin(session.optimizer, validate)
    for step in range(steps):
        done = train_step(training, step, lambda: snapshot(session) if copies else {})
        yield step, done.meanwhile


def snapshot(session: Session) -> dict[str, torch.Tensor]:
    """Copies of masks, adapters, moments and counts, by unit/part or unit.role/part."""
    held: dict[str, torch.Tensor] = {}
    for name, adapter in session.method.adapters.items():
        for role in ("mask", "A", "g", "B"):
            held[f"{name}/{role}"] = getattr(adapter, role).detach().clone()
    for name, moments in session.optimizer.state_dict().items():
        unit = name.rpartition(".")[0]
        held |= {f"{name}/{part}": moments[part].clone() for part in moments}
        held[f"{name}/mask"] = held[f"{unit}/mask"]
    return held


def validation(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """Who is left out, who is trained on in two epochs, and L1 before and after a few steps."""
    session = open_session(parse_config(config), world)
    validate, losses = make_validate(session), []
    losses.append(validate(False))
    for _ in drive(session, copies=False):
        losses.append(validate(False))
    batches, seen = iter(make_loader(session, world)), set()
    for step in batches:
        seen |= {record for _, batch in step.micro_batches for record in batch.records}
        if step.epoch >= 2:
            break
    return {"left_out": session.left_out.tolist(), "seen": sorted(seen), "losses": losses}


def evaluate(world: World, argument: dict[str, Any]) -> dict[str, float]:
    """Scores of a checkpoint's adapters."""
    return evaluate_saved(
        parse_config(argument["config"]), world, read_saved(Path(argument["checkpoint"]))
    )


def generated(world: World, argument: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers to prompts of token ids, and the forward passes that this rank made for them."""
    config = parse_config(argument["config"])
    model = open_saved_model(Path(argument["source"]), config, world)
    passes: list[None] = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(None))
    answers = generate(model, argument["prompts"], config.generation, seed=3)
    return [vars(answer) | {"passes": len(passes)} for answer in answers]


def settle() -> None:
    """Give freed memory back to the system, so that resident memory says what is in use."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident() -> int:
    """Anonymous resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def patience(world: World, how: str) -> list[str]:
    """A stage in which rank 0 works longer than collectives of the group may last, and rank 1 has
    nothing to do; or one of them fails, while the other works or waits."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=5))
    began = time.monotonic()

    def stop() -> None:
        if how == "fails in the wait" and world.rank == 1:
            raise UserError("asked to stop")

    patience = replace(world, saving=group).patience(stop)
    with world.all_or_none(patience) as said:
        if how == "fails" and world.rank == 0:
            raise UserError("a bad record")
        while world.rank == 0 and (how != "long" or time.monotonic() < began + 6):
            patience.check()
            threading.Event().wait(0.05)
        said.append("worked" if world.rank == 0 else "waited")
    return said


def asked(world: World, thinking: float) -> list[str | None]:
    """What rank 0's user says, after so many seconds, and that nothing follows, where collectives
    may last 5 seconds."""
    limit = timedelta(seconds=5)
    control, saving = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))

    def said(first: bool) -> str | None:
        threading.Event().wait(thinking if first else 0)
        return "Hello" if first else None

    limited = replace(world, control=control, saving=saving)
    found = []
    for first in (True, False):
        with patch.object(chat, "_read", lambda first=first: said(first)):
            found.append(chat.next_message(limited))
    return found


CASES = {
    "asked": asked,
    "train": train,
    "train_compiled": train_compiled,
    "kept_for_backward": kept_for_backward,
    "train_on_a_full_disk": train_on_a_full_disk,
    "shard": shard,
    "started": started,
    "gathered": gathered,
    "held": held,
    "not_finite": not_finite,
    "windows": windows,
    "unsharded_blocks": unsharded_blocks,
    "planned": planned,
    "loaded": loaded,
    "verified": verified,
    "train_only": train_only,
    "resume": resume,
    "go_on": go_on,
    "desynchronised": desynchronised,
    "masked_steps": masked_steps,
    "moments": moments,
    "validation": validation,
    "evaluate": evaluate,
    "generated": generated,
    "patience": patience,
}


def run_cases(file: str, folder: str, device: str = "cpu") -> None:
    """One rank's part. Results are replaced as a whole: another process watches them."""
    cases, out = json.loads(Path(file).read_text()), Path(folder)
    world = process_group.start(device, 120.0)
    results = {}
    for name, (function, argument) in cases.items():
        started, used = time.perf_counter(), time.process_time()
        try:
            result = {"ok": CASES[function](world, argument)}
        except Exception as error:
            result = {
                "error": type(error).__name__,
                "message": str(error),
                "exit_code": failures.exit_code(error),
                "traceback": traceback.format_exc(),
            }
        cpu = time.process_time() - used
        results[name] = result | {"seconds": time.perf_counter() - started, "cpu_seconds": cpu}
        unfinished = out / f"{world.rank}.tmp"
        unfinished.write_text(json.dumps(results))
        unfinished.replace(out / f"{world.rank}.json")
        gc.collect()
        gc.freeze()  # what is left are modules; loading a backbone collects garbage many times
    process_group.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with lean_runs():
        run_cases(*sys.argv[1:])
