"""Runs whose method decides, killed in the middle of every phase: what goes on is the same run.

A run is "killed" by copying its folder without the later checkpoints; what it had logged since
stays, as it would. `tests/launch/test_resume.py` kills some for real.
"""

import itertools
import json
import os
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import (
    ALL,
    ROOT,
    kept_steps,
    losses,
    python,
    quick_config,
    sample,
    save_random_model,
)
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, train_only
from trainer.checkpoint.saved import read_saved
from trainer.checkpoint.state import load_trained, read_initial_adapters
from trainer.checkpoint.store import read_tensors, verify
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.export.export import export_run
from trainer.records.jsonl import DECISIONS
from trainer.run.run import run
from trainer.session import open_session
from trainer.training.evaluation import evaluate_saved

STEPS = 12
ATTRIBUTED = ["method.kind=lelora", "method.policy.credit=attributed"]
RUNS = {  # name: (overrides, steps after which a run is killed; a checkpoint is every so many)
    # Selection is before step 6 (counted from 0).
    "weightlora": (["method.kind=weightlora", "method.warmup_steps=6"], [4, 8]),
    "weightlora_plus": (["method.kind=weightlora_plus", "method.warmup_steps=4"], [3, 6]),
    "lalora": (["method.kind=lalora", "method.gamma=5", "method.every=1"], [5]),
    "lelora": (["method.kind=lelora"], [6]),
    # Every draw meets the budget; the last one, before step 6, removes idle components.
    "budget": (
        [
            "method.kind=lelora", "method.coordinates=delta", "method.ranks=[0, 2, 4]",
            "method.rank=4", "method.policy.score=per_step", "method.policy.budget=2",
            "method.policy.freeze_after=6",
        ],
        [4, 8],
    ),
    "every-3": ([*ATTRIBUTED, "method.policy.every=3", "run.steps=18"], [4, 8]),  # in mid-period
    # Prunings are before steps 2, 4 and 6, the final one before step 8.
    "adalora": (
        ["method.kind=adalora", "method.delta_t=2", "method.tinit=1", "method.tfinal=4"], [5, 10],
    ),
}  # fmt: skip
CHOSEN = list(RUNS) if ALL else ["weightlora_plus", "lalora", "budget", "every-3", "adalora"]
PLACES = [(name, step) for name in CHOSEN for step in RUNS[name][1]]
# Where each of them goes on: everywhere in `make test-all`, else in one place, in turn.
SAME, OTHER, SINGLE = (PLACES if ALL else PLACES[turn::3] for turn in range(3))
ALONE = {  # the same in one process only
    "all-kept": (["method.kind=weightlora", "method.warmup_steps=2", "method.keep=14"], [1, 6]),
    "kept": (
        ["method.kind=weightlora_plus", "method.warmup_steps=4", "method.expand=kept"], [6],
    ),
    "rounds": (
        [
            "method.kind=weightlora_plus", "method.warmup_steps=3", "method.rounds=2",
            "method.threshold=last", "method.expand=authors",
        ],
        [2, 4, 8],
    ),
    "rlora": (["method.kind=rlora"], [6]),
    "fisher": (
        ["method.kind=lalora", "method.gamma=5", "method.every=2", "method.contribution=fisher"],
        [5],
    ),
    "attributed": (ATTRIBUTED, [6]),
    "validation": (
        [*ATTRIBUTED, "method.policy.signal=validation", "method.policy.validation_samples=4"], [6],
    ),
    "global": (
        [
            "method.kind=lelora", "method.policy.credit=global", "method.policy.every=2",
            "method.policy.validation_samples=4",
        ],
        [5],
    ),
    "dylora": (["method.kind=dylora", "method.dropout=0.1"], [6]),
    "milora": (["method.kind=milora", "method.dropout=0.1"], [6]),
}  # fmt: skip


def configuration(tmp, name: str, *overrides: str) -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name}", f"run.steps={STEPS}",
        "data.max_length=64", "data.on_bad_record=skip", "data.eval_records=4",
        "data.batch_size=3", "data.micro_batch_size=1", "checkpoint.keep=99", *overrides,
    )  # fmt: skip


def interrupted(tmp, name: str, engine: str, run_name: str) -> Config:
    overrides, steps = (RUNS | ALONE)[name]
    return configuration(
        tmp, run_name, f"engine.kind={engine}", f"checkpoint.every={steps[0]}", "data.eval=null",
        "model.quantization=nf4", *overrides,
    )  # fmt: skip


def decisions(folder) -> list[dict]:
    file = folder / DECISIONS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a backbone of two layers, 14 units."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("resume")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    return tmp


@pytest.fixture(scope="module")
def outcome(place):
    """Whole runs on ZeRO-3 and two processes; then they go on there, on FSDP2 and in one."""
    tmp = place
    cases = {
        name: ("train_only", interrupted(tmp, name, "deepspeed", name).model_dump())
        for name in CHOSEN
    }
    for engine, places in (("deepspeed", SAME), ("fsdp2", OTHER)):
        for name, step in places:
            config = interrupted(tmp, name, engine, f"{name}-{step}-{engine}")
            cases[config.run.name] = (
                "resume",
                {"config": config.model_dump(), "source": f"{tmp}/runs/{name}", "step": step},
            )
    for kind, step, engine in EVALUATED:
        config = trained(tmp, kind)
        options = config.engine.model_copy(update={"kind": engine})
        other = config.model_copy(update={"engine": options}).model_dump()
        cases[f"evaluate-{kind}"] = (
            "evaluate", {"config": other, "checkpoint": str(saved(config, step))},
        )  # fmt: skip
    return tmp, run_cases(tmp / "work", cases)


def check_same_run(tmp, name: str, other: str, *, exactly: bool, step: int = 0) -> None:
    """`step`: it went on from there, and did not begin anew."""
    whole, resumed = tmp / "runs" / name, tmp / "runs" / other
    assert kept_steps(resumed, step) == kept_steps(whole, step)
    expected, found = losses(whole), losses(resumed)
    decided, again = decisions(whole), decisions(resumed)
    if exactly:
        assert again == decided
        assert found == expected
        return
    assert [(d["step"], d["digest"]) for d in again] == [(d["step"], d["digest"]) for d in decided]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "step"), SAME)
def test_on_the_same_engine_it_is_the_same_run(outcome, name, step):
    tmp, results = outcome
    for case in (name, f"{name}-{step}-deepspeed"):
        ok(results[case])
    assert len(losses(tmp / "runs" / name)) >= STEPS
    check_same_run(tmp, name, f"{name}-{step}-deepspeed", exactly=True, step=step)


def logged(folder) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timing = ("tokens_per_second", "step_seconds", "peak_memory_gib", "peak_memory_gib_by_rank")
    return [{k: v for k, v in line.items() if k not in timing} for line in lines]


@pytest.mark.parametrize(("name", "step"), SAME)
def test_on_the_same_engine_it_logs_the_same(outcome, name, step):
    """The method's figures too; those of a draw that was made before the kill may be left out."""
    tmp, results = outcome
    ok(results[f"{name}-{step}-deepspeed"])
    whole, again = (logged(tmp / "runs" / run) for run in (name, f"{name}-{step}-deepspeed"))
    for expected, found in zip(whole, again, strict=True):
        missing = expected.keys() - found.keys()
        assert all(key.startswith("method/") for key in missing)
        assert not missing or name == "every-3"
        assert found == {key: value for key, value in expected.items() if key not in missing}


@pytest.mark.parametrize(("name", "step"), OTHER)
def test_on_another_engine_it_is_nearly_the_same_run(outcome, name, step):
    tmp, results = outcome
    ok(results[f"{name}-{step}-fsdp2"])
    check_same_run(tmp, name, f"{name}-{step}-fsdp2", exactly=False, step=step)


@pytest.mark.parametrize(("name", "step"), SINGLE)
def test_in_one_process_it_is_nearly_the_same_run(outcome, name, step):
    tmp, results = outcome
    ok(results[name])
    alone = interrupted(tmp, name, "single", f"{name}-{step}-single")
    cut_run(tmp / "runs" / name, alone.run_folder, step)
    train_only(World(), alone.model_dump())
    check_same_run(tmp, name, f"{name}-{step}-single", exactly=False, step=step)


@pytest.mark.parametrize("name", sample(ALONE, "kept", "fisher", "validation", "dylora"))
def test_in_one_process_all_along_it_is_the_same_run(place, name):
    whole = interrupted(place, name, "single", name)
    train_only(World(), whole.model_dump())
    for step in ALONE[name][1]:
        again = interrupted(place, name, "single", f"{name}-{step}")
        cut_run(whole.run_folder, again.run_folder, step)
        train_only(World(), again.model_dump())
        check_same_run(place, name, f"{name}-{step}", exactly=True, step=step)


def test_the_checkpoints_were_in_the_phases_that_they_are_said_to_be_in(outcome):
    tmp, _ = outcome
    runs = tmp / "runs"

    def stored(name: str, step: int) -> dict:
        return read_tensors(runs / name / f"checkpoints/step-{step:08d}")

    for name, step in [("weightlora", 6)] * ALL + [("weightlora_plus", 4)]:
        assert [d["step"] for d in decisions(runs / name) if "survivors" in d] == [step]
    held = stored("weightlora_plus", 3), stored("weightlora_plus", 6)
    assert [sum(name.endswith("/A") for name in tensors) for tensors in held] == [14, 7]
    drawn = decisions(runs / "budget")
    assert [d["step"] for d in drawn] == list(range(7))
    units = json.loads((runs / "budget/units.json").read_text())
    sizes = {unit["name"]: unit["in_features"] + unit["out_features"] for unit in units}
    for ranks in (d["ranks"] for d in drawn):
        assert sum(sizes[name] * rank for name, rank in ranks.items()) <= 2 * sum(sizes.values())
    held = {n.split("/")[1]: len(t) for n, t in stored("budget", 8).items() if n.endswith("/A")}
    assert held == {name: rank for name, rank in drawn[-1]["ranks"].items() if rank}
    held = {len(t) for n, t in stored("budget", 4).items() if n.endswith("/A")}
    assert held == {3 * 4}
    assert [d["step"] for d in decisions(runs / "every-3")] == [0, 3, 6, 9, 12, 15]
    for step, pending in ((4, {"0", "1"}), (8, {"0", "1"})):
        names = [name for name in stored("every-3", step) if "/draw." in name]
        assert {name.split("/draw.")[1][0] for name in names} == pending
    assert [(d["step"], d["final"]) for d in decisions(runs / "adalora")] == [
        (2, False), (4, False), (6, False), (8, True),
    ]  # fmt: skip
    masks = [stored("adalora", s)[n] for s in (5, 10) for n in stored("adalora", s) if "/mask" in n]
    assert [int(torch.cat(part).sum()) for part in (masks[:14], masks[14:])] == [14 * 12, 14 * 8]


# --- evaluation and export from either phase ------------------------------------------------------

TRAINED = {
    "lora": [],
    "pissa": [],
    "milora": [],
    "adalora": ["method.delta_t=2", "method.tinit=1", "method.tfinal=2"],
    "dylora": ["method.export_rank=4"],
    "rlora": [],
    "weightlora": ["method.warmup_steps=5", "method.keep=5"],
    "weightlora_plus": ["method.warmup_steps=5", "method.keep=5"],
    "lalora": ["method.gamma=20", "method.every=1"],
    "lelora": [],
}
EVALUATED = [("lelora", 4, "fsdp2"), ("weightlora_plus", 8, "deepspeed"), ("dylora", 8, "ddp")]
SAVED = list(itertools.product(TRAINED, (4, 8))) if ALL else [
    ("pissa", 8), ("dylora", 8), ("weightlora_plus", 4), ("weightlora_plus", 8), ("lalora", 4),
    ("lelora", 8),
]  # fmt: skip


def trained(tmp, kind: str) -> Config:
    """A run of 8 steps, saved and evaluated after 4 and 8; made where it is not there."""
    config = configuration(
        tmp, f"trained-{kind}", f"method.kind={kind}", *TRAINED[kind], "run.steps=8",
        "checkpoint.every=4", "run.eval_every=4",
    )  # fmt: skip
    if not config.run_folder.exists():
        run(config, World())
    return config


def saved(config: Config, step: int):
    return config.run_folder / f"checkpoints/step-{step:08d}"


def eval_loss(config: Config, step: int) -> float:
    """What the run itself measured then."""
    lines = map(json.loads, (config.run_folder / "metrics.jsonl").read_text().splitlines())
    return next(x["eval_loss"] for x in lines if x["step"] == step and "eval_loss" in x)


def inputs() -> torch.Tensor:
    return torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def own_logits(config: Config, step: int) -> torch.Tensor:
    """Logits of the trained session itself."""
    initial_adapters = read_initial_adapters(saved(config, step), verify(saved(config, step)))
    session = open_session(config, World(), initial_adapters)
    load_trained(session, saved(config, step), read_tensors(saved(config, step)))
    session.model.eval()
    with session.method.inference():
        return session.model(inputs()).logits


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(inputs()).logits


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(("kind", "step"), SAVED)
def test_a_checkpoint_of_either_phase_evaluates_as_the_run_did(place, kind, step):
    config = trained(place, kind)
    scores = evaluate_saved(config, World(), read_saved(saved(config, step)))
    assert scores["eval_loss"] == pytest.approx(eval_loss(config, step), rel=1e-6)


@pytest.mark.parametrize(("kind", "step"), SAVED)
def test_a_checkpoint_of_either_phase_exports_to_the_same_logits(place, kind, step, tmp_path):
    config = trained(place, kind)
    expected = own_logits(config, step)
    untouched = logits(plain(place / "model"))
    assert (expected - untouched).abs().max() > 1e-2, "training changed nothing"
    export_run(saved(config, step), tmp_path / "adapter", World())
    adapted = peft.PeftModel.from_pretrained(plain(place / "model"), tmp_path / "adapter")
    assert torch.allclose(logits(adapted), expected, atol=1e-4)
    export_run(saved(config, step), tmp_path / "merged", World(), what="merged")
    assert torch.allclose(logits(plain(tmp_path / "merged")), expected, atol=1e-4)
    exported = load_file(tmp_path / "adapter/adapter_model.safetensors")
    if step == 8:
        final = load_file(config.run_folder / "adapter/adapter_model.safetensors")
        assert final.keys() == exported.keys()
        assert all(torch.equal(final[name], exported[name]) for name in final)
    held = {n.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
            for n, tensor in exported.items() if "lora_A" in n}  # fmt: skip
    if kind == "lalora":  # truncated to what the last step used
        ranks = decisions(config.run_folder)[step - 1]["ranks"]
        assert held == {name: ranks[name.split(".")[2]] for name in held} and len(held) == 14
    if kind == "lelora":  # twice what was ever trained
        touched = read_tensors(saved(config, step))["method/touched"].sum(1).tolist()
        names = [
            unit["name"] for unit in json.loads((config.run_folder / "units.json").read_text())
        ]
        twice = {name: 2 * count for name, count in zip(names, touched, strict=True) if count}
        assert held == twice
    if kind == "dylora":
        assert set(held.values()) == {4}
    if kind.startswith("weightlora"):
        assert 0 < len(exported) / 2 <= 5, "a unit with ω = 0 was exported"
        ranks = {len(tensor) for name, tensor in exported.items() if "lora_A" in name}
        assert ranks == {8 * (14 // 5) if (kind, step) == ("weightlora_plus", 8) else 8}


def test_command_lines_take_checkpoints_of_either_phase(place, tmp_path):
    config = trained(place, "weightlora_plus")
    code, out, err = python("launch/evaluate.py", str(saved(config, 4)))
    assert code == 0, err
    scores = json.loads(out.splitlines()[-1])
    assert scores["eval_loss"] == pytest.approx(eval_loss(config, 4), rel=1e-6)
    config = trained(place, "lelora")
    copied = tmp_path / "elsewhere"  # a run folder that was moved
    shutil.copytree(config.run_folder, copied)
    out_folder = str(tmp_path / "out")
    code, _, err = python(
        "launch/export.py", str(copied), out_folder, "--what", "merged"
    )  # fmt: skip
    assert code == 0, err
    assert torch.allclose(logits(plain(out_folder)), own_logits(config, 8), atol=1e-4)


@pytest.mark.parametrize(("kind", "step", "engine"), EVALUATED)
def test_two_processes_evaluate_what_one_has_trained(outcome, kind, step, engine):
    tmp, results = outcome
    for scores in ok(results[f"evaluate-{kind}"]):
        assert scores["eval_loss"] == pytest.approx(eval_loss(trained(tmp, kind), step), rel=1e-6)
