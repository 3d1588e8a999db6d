"""`optim.shard_state`: each rank updates its part of the adapters, and nothing else changes.

Runs with it and without, in two processes; then their checkpoints, gone on from without and with
it in other places.
"""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import (
    ALL,
    ROOT,
    kept_steps,
    losses,
    quick_config,
    save_mixture,
    save_random_model,
)
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, train_only
from trainer.checkpoint.store import complete, read_tensors
from trainer.config.config import Config
from trainer.distributed.world import World

STEPS = 8
METHODS = {
    "lora": [],
    "weightlora_plus": ["method.warmup_steps=4"],  # units removed, others grow, before step 4
    "lalora": ["method.gamma=5", "method.every=1"],
    "lelora": [],
    "adalora": ["method.delta_t=2"],
    "mixture": ["method.kind=lora", "method.targets=all-linear"],  # experts without a token rest
}
RUNS = [
    *((method, "fsdp2") for method in (METHODS if ALL else ("lora", "weightlora_plus"))),
    *((method, "deepspeed") for method in ("lora", "weightlora_plus", "lelora") if ALL),
    *((method, "deepspeed") for method in ("lelora", "mixture") if not ALL),
]
MEASURED = ["fsdp2", "deepspeed"] if ALL else ["fsdp2"]
STATES = [("weightlora_plus", 3), ("lora", 3), ("weightlora_plus", 6)]
STATES += [("lalora", 3)] * ALL
# (it was saved with it, engine and processes that go on, these with it)
RESUMED = [
    (True, "single", 1, False), (False, "deepspeed", 2, True), (True, "fsdp2", 3, True),
]  # fmt: skip
RESUMED += [(True, "fsdp2", 2, False), (False, "deepspeed", 3, True)] * ALL


def configuration(tmp, method: str, engine: str, shards: bool, name: str | None = None) -> Config:
    model = "mixture" if method == "mixture" else "model"
    return quick_config(
        tmp, f"model.id={tmp}/{model}", f"run.steps={STEPS}", f"engine.kind={engine}",
        f"run.name={name or named(method, engine, shards)}", "data.max_length=64",
        "data.on_bad_record=skip", "data.eval=null", "data.batch_size=3", "data.micro_batch_size=1",
        "checkpoint.every=3", "checkpoint.keep=99", "optim.weight_decay=0.1",
        f"optim.shard_state={str(shards).lower()}", f"method.kind={method.replace('mixture', 'lora')}",
        *METHODS[method],
    )  # fmt: skip


def named(method: str, engine: str, shards: bool) -> str:
    return f"{method}-{engine}-{'split' if shards else 'whole'}"


def going_on(tmp, place) -> dict[str, tuple[Config, str, int]]:
    """(configuration, the run that is gone on from, at which step) by name."""
    saved_with, engine, processes, shards = place
    found = {}
    for method, step in STATES if ALL else [STATES[RESUMED.index(place)]]:  # all, or one in turn
        name = f"{method}-{step}-from-{saved_with}-on-{engine}{processes}"
        source = named(method, "fsdp2", saved_with)
        found[name] = configuration(tmp, method, engine, shards, name), source, step
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("shard_state")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    save_mixture(tmp / "mixture", "mixtral")
    cases = {}
    for method, engine in RUNS:
        for shards in (False, True):
            config = configuration(tmp, method, engine, shards)
            cases[config.run.name] = ("train_only", config.model_dump())
    for engine in MEASURED:
        for shards in (False, True):
            config = configuration(tmp, "lora", engine, shards)
            cases[f"moments-{config.run.name}"] = ("moments", config.model_dump())
    results = run_cases(tmp / "work", cases)
    moments = {name: ok(result) for name, result in results.items()}
    by_processes: dict[int, dict] = {}
    for place in RESUMED:
        for name, (config, source, step) in going_on(tmp, place).items():
            argument = {
                "config": config.model_dump(),
                "source": f"{tmp}/runs/{source}",
                "step": step,
            }
            by_processes.setdefault(place[2], {})[name] = ("resume", argument)
            if place[2] == 1:
                cut_run(tmp / "runs" / source, config.run_folder, step)
                train_only(World(), config.model_dump())
    for processes in (2, 3):
        results = run_cases(tmp / f"resumed-{processes}", by_processes[processes], processes)
        for result in results.values():
            ok(result)
    return tmp, moments


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize(("method", "engine"), RUNS)
def test_with_it_and_without_it_is_the_same_run(outcome, method, engine):
    """Every loss, and every tensor of every checkpoint: adapters, moments, counts, the method's."""
    runs, _ = outcome
    whole, split = (runs / "runs" / named(method, engine, shards) for shards in (False, True))
    assert losses(split) == losses(whole)
    assert len(losses(whole)) == STEPS
    checkpoints = [complete(run / "checkpoints") for run in (whole, split)]
    assert [path.name for path in checkpoints[1]] == [f"step-{n:08d}" for n in (3, 6, 8)]
    for expected, found in zip(*(map(read_tensors, c) for c in checkpoints), strict=True):
        assert found.keys() == expected.keys()
        assert any(name.endswith("/exp_avg_sq") for name in found)
        for name, tensor in expected.items():
            assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.parametrize("place", RESUMED, ids=str)
def test_a_checkpoint_does_not_know_of_it(outcome, place):
    runs, _ = outcome
    _, engine, processes, _ = place
    for name, (config, source, step) in going_on(runs, place).items():
        expected, found = losses(runs / "runs" / source), losses(config.run_folder)
        assert len(found) == STEPS
        assert kept_steps(config.run_folder, step) == kept_steps(runs / "runs" / source, step)
        exact = (engine, processes) == ("fsdp2", 2)  # as it was saved
        assert found == (expected if exact else pytest.approx(expected, rel=1e-4)), name


@pytest.mark.parametrize("engine", MEASURED)
def test_each_of_two_ranks_holds_half_of_the_moments(outcome, engine):
    for shards in (False, True):
        for held in outcome[1][f"moments-{named('lora', engine, shards)}"]:
            assert held["moments"] * (2 if shards else 1) == held["values"] > 0
