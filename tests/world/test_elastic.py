"""Save on one engine and number of processes, resume on another: the losses of one whole run.

Every pair of thirteen places × five states with RANKCAST_ALL (`make test-all`); a sample otherwise.
"""

import itertools
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import ALL, ROOT, kept_steps, losses, quick_config, save_random_model
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, train_only
from trainer.config.config import Config, parse_config
from trainer.distributed.world import World

STEPS = 8
METHODS = {
    "lora": ["method.kind=lora"],
    "weightlora": ["method.kind=weightlora", "method.warmup_steps=4"],
    "lalora": ["method.kind=lalora", "method.gamma=5", "method.every=1"],
    "lelora": ["method.kind=lelora"],
}
STATES = [  # (method, step of the checkpoint): WeightLoRA's selection is before step 4
    ("lora", 3), ("weightlora", 3), ("weightlora", 6), ("lalora", 3), ("lelora", 3),
]  # fmt: skip
ALONE = ("single", 1)
PLACES = [ALONE, *itertools.product(("ddp", "peer", "fsdp2", "deepspeed"), (1, 2, 3))]
SAMPLE = [
    (ALONE, ("peer", 3)), (ALONE, ("deepspeed", 3)), (("fsdp2", 2), ALONE),
]  # fmt: skip
PAIRS = list(itertools.product(PLACES, PLACES)) if ALL else SAMPLE


def states(source, target) -> list[tuple[str, int]]:
    """Those that are tried between two places: all, or one of them in turn."""
    return STATES if ALL else [STATES[2 * PAIRS.index((source, target))]]


def named(place) -> str:
    return f"{place[0]}{place[1]}"


def configuration(tmp, method: str, place, name: str) -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name}", f"run.steps={STEPS}",
        "data.max_length=64", "data.on_bad_record=skip", "data.eval=null", "data.batch_size=3",
        "data.micro_batch_size=1", "checkpoint.every=3", "checkpoint.keep=99",
        "model.quantization=nf4", f"engine.kind={place[0]}", *METHODS[method],
    )  # fmt: skip


def run_all(tmp, place, cases: dict) -> None:
    """The cases in one start of a place's processes."""
    if place == ALONE:
        for function, argument in cases.values():
            if function == "resume":
                target = parse_config(argument["config"]).run_folder
                cut_run(Path(argument["source"]), target, argument["step"])
                argument = argument["config"]
            train_only(World(), argument)
        return
    results = run_cases(tmp / f"work-{named(place)}-{len(cases)}", cases, processes=place[1])
    for case in results.values():
        ok(case)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Whole runs in every place that saves; then every pair's second half."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("elastic")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    whole: dict = {ALONE: {}}
    for source, target in PAIRS:
        for method, _ in states(source, target):
            for place in (ALONE, source):
                config = configuration(tmp, method, place, f"{method}-{named(place)}")
                whole.setdefault(place, {})[method] = ("train_only", config.model_dump())
    for place, cases in whole.items():
        run_all(tmp, place, cases)
    for place in {target for _, target in PAIRS}:
        cases = {}
        for source in (source for source, target in PAIRS if target == place):
            for method, step in states(source, place):
                name = f"{method}-{step}-{named(source)}-{named(place)}"
                config = configuration(tmp, method, place, name)
                whole = tmp / f"runs/{method}-{named(source)}"
                cases[name] = (
                    "resume",
                    {"config": config.model_dump(), "source": str(whole), "step": step},
                )
        run_all(tmp, place, cases)
    return tmp / "runs"


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda place: named(place))
def test_saved_in_one_place_and_resumed_in_another_it_is_the_same_run(resumed, source, target):
    for method, step in states(source, target):
        expected = losses(resumed / f"{method}-{named(ALONE)}")
        again = resumed / f"{method}-{step}-{named(source)}-{named(target)}"
        found = losses(again)
        assert len(found) == STEPS
        assert kept_steps(again, step) == kept_steps(resumed / f"{method}-{named(source)}", step)
        assert found == pytest.approx(expected, rel=1e-4), (method, step)
