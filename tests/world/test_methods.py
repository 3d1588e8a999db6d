"""Methods that decide: the same decisions on every engine, masks that hold, runs that replay.

Whatever needs two processes runs in one pair of them. `RANKCAST_ALL=1` adds every method on every
weight format, on a backbone with real spectra where it is there.
"""

import contextlib
import json
import os
import shutil
import time

import pytest
from transformers import AutoModelForCausalLM

from tests.conftest import SHARED
from tests.helpers import (
    ALL,
    ROOT,
    TINY,
    losses,
    quick_config,
    sample,
    save_random_model,
    thorough,
)
from tests.world.cases import ok, run_cases
from tests.world.worker import masked_steps, train_only
from trainer.checkpoint.store import newest, read_tensors
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.records.jsonl import DECISIONS as FILE

ENGINES = ["ddp", "peer", "fsdp2", "deepspeed"]
FORMATS = ["none", "nf4", "int8"]
STEPS = 40
OMEGA = "method.warmup_steps=20"
# Adam's first step of a component is as long as the learning rate in every entry, those whose
# gradient is nothing but rounding too. LeLoRA wakes components all the time: at the quickstart's
# 4e-3 two engines can be 1e-4 of the loss apart after ten steps and draw differently after fifteen.
# (La-LoRA too, on a backbone with real spectra: see `product`.)
LELORA = ["method.kind=lelora", "optim.learning_rate=5e-4"]
# At its default rate the policy settles within a few steps on a backbone as small as these.
SLOWLY = [*LELORA, "method.policy.learning_rate=3e-4"]
VARIANTS = {
    "lelora": LELORA,
    "lelora-global": [*SLOWLY, "method.policy.credit=global"],
    "lelora-attributed": [*SLOWLY, "method.policy.credit=attributed"],
    "lelora-validation": [*SLOWLY, "method.policy.signal=validation"],
    "lalora": ["method.kind=lalora", "method.gamma=5", "method.every=1"],
    "weightlora": ["method.kind=weightlora", OMEGA],
    "weightlora_plus": [
        "method.kind=weightlora_plus",
        "method.warmup_steps=10",
        "method.rounds=2",
        "method.threshold=last",
        "method.score=per_parameter",
        "method.keep_parameters=0.5",
        "method.expand=authors",
    ],
    "adalora": ["method.kind=adalora", "method.delta_t=2"],
    "dylora": ["method.kind=dylora"],
    "rlora": ["method.kind=rlora"],
}
DECISIONS = {  # in 40 steps: (how many, at least so many different ones)
    "lelora": (40, 4),
    "lelora-global": (40, 20),
    "lelora-attributed": (40, 20),
    "lelora-validation": (40, 4),
    "lalora": (40, 12),
    "weightlora": (21, 3),
    "weightlora_plus": (21, 3),
    "adalora": (12, 6),
    "dylora": (40, 6),
    "rlora": (1, 1),
}

SAMPLE = {  # what `make test` runs: weight format, and overrides that make it shorter
    "lelora": ("none", []),
    "lalora": ("nf4", []),
    "weightlora_plus": ("int8", ["run.steps=24"]),  # decides before steps 0 to 20
    "adalora": ("none", []),
    "dylora": ("int8", ["run.steps=12"]),  # its draws follow from the seed alone
    "rlora": ("nf4", ["run.steps=8"]),  # decides before step 0
}
PAIRS = [  # each of them on one engine in turn; on all of them in `make test-all`
    (variant, engine)
    for number, variant in enumerate(SAMPLE)
    for engine in ENGINES
    if ALL or engine == ENGINES[number % len(ENGINES)]
]
MASKED = [
    *(("lelora", engine) for engine in (ENGINES if ALL else ["ddp", "fsdp2"])),
    *(("lalora", engine) for engine in (ENGINES if ALL else ["deepspeed"])),
]


def configuration(tmp, name: str, *overrides: str) -> Config:
    """Three micro-batches a step: one process and two add their gradients in another order."""
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name}", f"run.steps={STEPS}", "data.eval=null",
        "model.dtype=float32", "data.max_length=48", "data.on_bad_record=skip",
        "data.batch_size=3", "data.micro_batch_size=1", *overrides,
    )  # fmt: skip


def allocated(tmp, variant: str, fmt: str, engine: str, *more: str) -> Config:
    return configuration(
        tmp, f"{variant}-{fmt}-{engine}", f"engine.kind={engine}", f"model.quantization={fmt}",
        *VARIANTS[variant], *more,
    )  # fmt: skip


def decisions(run) -> list[dict]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


def compare(tmp, variant: str, fmt: str, engine: str) -> None:
    """Decisions are the same ones as in one process, and losses with them."""
    alone, spread = (tmp / "runs" / f"{variant}-{fmt}-{e}" for e in ("single", engine))
    count, different = DECISIONS[variant]
    expected = [(d["step"], d["digest"]) for d in decisions(alone)]
    found = [(d["step"], d["digest"]) for d in decisions(spread)]
    assert len(expected) == min(count, len(losses(alone)))
    assert len({digest for _, digest in expected}) >= different
    first = next((a[0] for a, b in zip(expected, found, strict=True) if a != b), None)
    assert first is None, f"decisions differ from step {first} on"
    pairs = list(zip(losses(alone), losses(spread), strict=True))
    # LLM.int8 rounds activations, so the last bits of one step may be a jump in the next.
    assert max(abs(a - b) / a for a, b in pairs) <= (2e-3 if fmt == "int8" else 1e-4)


# --- what is run ----------------------------------------------------------------------------------

FOLLOWED = {  # recorded by one process → followed by another engine that would decide otherwise
    "lelora": ("lelora-none-single", "fsdp2", ["run.seed=1"]),
    "lalora": ("lalora-nf4-single", "deepspeed", ["method.gamma=50", "method.every=1"]),
    "weightlora_plus": ("plus", "ddp", ["method.omega_learning_rate=0.01", "run.seed=1"]),
    "dylora": ("dylora-int8-single", "fsdp2", ["run.seed=1"]),
}
FOLLOWS = list(FOLLOWED) if ALL else ["lelora", "lalora", "weightlora_plus"]
FOLLOWING_STEPS = 12
QUICK_PLUS = ["method.kind=weightlora_plus", "method.warmup_steps=3", "method.rounds=2"]


def following(tmp, kind: str, *more: str, name: str = "following") -> Config:
    recorded, engine, changes = FOLLOWED[kind]
    base = QUICK_PLUS if kind == "weightlora_plus" else VARIANTS[kind]
    return configuration(
        tmp, f"{name}-{kind}", f"engine.kind={engine}", *base, *changes,
        f"run.steps={FOLLOWING_STEPS}", f"method.replay={tmp}/runs/{recorded}", *more,
    )  # fmt: skip


# name: (overrides of a lelora run, what the one line must say)
REFUSED = {
    "missing": (["method.replay=TMP/runs/none"], ["TMP/runs/none"]),
    "no record": (["method.replay=TMP/model/config.json"], ["config.json"]),
    "of another method": (
        ["method.replay=TMP/runs/lalora-nf4-single"], ["made by lalora", "accepted: lelora"],
    ),
    "too short": (["run.steps=41"], ["lelora-none-single", "step 40", "accepted: a longer run"]),
    "damaged": (["method.replay=TMP/damaged.jsonl"], ["damaged.jsonl", "step 3", "damaged"]),
    "of more units": (["method.targets=[q_proj]"], ["lelora-none-single", "no unit of this run"]),
    "of fewer units": (["method.replay=TMP/runs/few"], ["runs/few", "q_proj"]),
    "of larger ranks": (["method.rank=4"], ["lelora-none-single", "8"]),
    "of other locations": (["method.locations=[primary]"], ["lelora-none-single"]),
}  # fmt: skip


TOGETHER = ["missing", "too short", "of fewer units"]
"""The refusals that are tried on two processes; the others in one."""


def refused(tmp, name: str, engine: str) -> Config:
    changes = [change.replace("TMP", str(tmp)) for change in REFUSED[name][0]]
    return configuration(
        tmp, f"refused-{name.replace(' ', '-')}-{engine}", f"engine.kind={engine}", "run.steps=4",
        "method.kind=lelora", f"method.replay={tmp}/runs/lelora-none-single", *changes,
    )  # fmt: skip


STRAYS = {  # (method, engine, what rank 1 does otherwise)
    "mask": ("lelora", "fsdp2"),
    "gate": ("lalora", "deepspeed"),
    "name": ("dylora", "ddp"),
}
STRAY_STEP = 5


def straying(tmp, what: str) -> dict:
    kind, engine = STRAYS[what]
    config = configuration(
        tmp, f"stray-{what}", f"engine.kind={engine}", "run.steps=9", "checkpoint.every=3",
        *VARIANTS[kind],
    )  # fmt: skip
    return {"config": config.model_dump(), "step": STRAY_STEP, "what": what}


def masked(tmp, kind: str, engine: str) -> Config:
    return configuration(
        tmp, "masked", f"engine.kind={engine}", *VARIANTS[kind], "run.steps=3",
        "optim.weight_decay=0.1", "optim.warmup_ratio=0", "optim.learning_rate=0.01",
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One process records; then two processes run everything else."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("methods")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    for variant, (fmt, shorter) in SAMPLE.items():
        train_only(World(), allocated(tmp, variant, fmt, "single", *shorter).model_dump())
    plus = configuration(tmp, "plus", *QUICK_PLUS, f"run.steps={FOLLOWING_STEPS}")
    few = configuration(tmp, "few", "method.kind=lelora", "method.targets=[k_proj]", "run.steps=4")
    for config in (plus, few):
        train_only(World(), config.model_dump())
    lines = (tmp / "runs/lelora-none-single" / FILE).read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"primary"', '"minor"', 1)
    (tmp / "damaged.jsonl").write_text("".join(lines))
    cases = {}
    for variant, engine in PAIRS:
        fmt, shorter = SAMPLE[variant]
        config = allocated(tmp, variant, fmt, engine, *shorter)
        cases[config.run.name] = ("train_only", config.model_dump())
    for kind, engine in MASKED:
        cases[f"masked-{kind}-{engine}"] = ("masked_steps", masked(tmp, kind, engine).model_dump())
    for kind in FOLLOWS:
        cases[f"following-{kind}"] = ("train_only", following(tmp, kind).model_dump())
    for name in TOGETHER:
        cases[f"refused-{name}"] = ("train_only", refused(tmp, name, "ddp").model_dump())
    for what in STRAYS:
        cases[f"stray-{what}"] = ("desynchronised", straying(tmp, what))
    yield tmp, run_cases(tmp / "work", cases)


# --- the same decisions ---------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "engine"), PAIRS)
def test_decisions_agree_with_one_process(outcome, variant, engine):
    tmp, results = outcome
    fmt, _ = SAMPLE[variant]
    ok(results[f"{variant}-{fmt}-{engine}"])
    compare(tmp, variant, fmt, engine)


@pytest.fixture(scope="module", params=FORMATS)
def product(request, tmp_path_factory):
    """Every method on every engine with one weight format."""
    os.chdir(ROOT)
    tmp, fmt = tmp_path_factory.mktemp(f"all-{request.param}"), request.param
    real = SHARED / "models/stories260K"
    (tmp / "model").symlink_to(real if real.is_dir() else TINY)
    records = [
        json.loads(line)["question"] for line in (ROOT / "configs/quickstart/train.jsonl").open()
    ]
    (tmp / "text.jsonl").write_text("".join(json.dumps({"text": r}) + "\n" for r in records[:80]))
    text = [f"data.train={tmp}/text.jsonl", "data.format=text"]
    results = {}
    for engine in ["single", *ENGINES]:
        cases = {}
        for variant, changes in VARIANTS.items():
            own = {"lalora": ["optim.learning_rate=2e-3"]}.get(variant, [])
            if "method.kind=lelora" in changes:
                own = ["method.policy.validation_samples=6"]
            config = allocated(tmp, variant, fmt, engine, *text, *own)
            cases[config.run.name] = ("train_only", config.model_dump())
        results |= run_cases(tmp / engine, cases, 1 if engine == "single" else 2)
    return tmp, fmt, results


@thorough
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_decisions_agree_on_every_format(product, variant, engine):
    tmp, fmt, results = product
    ok(results[f"{variant}-{fmt}-{engine}"])
    compare(tmp, variant, fmt, engine)


# --- a rank that strays ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", list(STRAYS))
def test_a_rank_that_strays_is_caught_at_that_step(outcome, what):
    tmp, results = outcome
    ranks = results[f"stray-{what}"]
    for rank in ranks:
        assert "error" in rank, "nobody noticed"
        assert rank["exit_code"] == 1 and rank["seconds"] < 20
    assert [rank["error"] for rank in ranks] == ["RunFailed", "FailedElsewhere"]
    message = ranks[0]["message"]
    assert message.startswith(f"step {STRAY_STEP}: ") and "of rank 1 differ" in message
    assert "\n" not in message
    run = tmp / "runs" / f"stray-{what}"
    assert len(losses(run)) == STRAY_STEP
    assert [d["step"] for d in decisions(run)] == list(range(STRAY_STEP))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000003"]


# --- frozen means frozen --------------------------------------------------------------------------


def check_masked(found: dict) -> None:
    assert found["moved"] == []
    assert found["active"] > 100 and found["resting"] > 100
    assert found["with_momentum"] > 20, "nothing that had been trained came to rest"
    assert found["still"] == 0, "components were active and did not move"


@pytest.mark.parametrize(("kind", "engine"), MASKED)
def test_what_is_not_active_stays_bit_identical(outcome, kind, engine):
    _, results = outcome
    for found in ok(results[f"masked-{kind}-{engine}"]):
        if kind == "lelora":
            check_masked(found)
        assert found["moved"] == [] and found["resting"] > 100 and found["still"] == 0


def test_what_is_not_active_stays_bit_identical_alone(outcome):
    tmp, results = outcome
    found = masked_steps(World(), masked(tmp, "lelora", "single").model_dump())
    check_masked(found)
    assert found == ok(results["masked-lelora-ddp"])[0]


# --- runs that follow another ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", sample(FOLLOWED, *FOLLOWS))
def test_a_replay_follows_the_recorded_decisions(outcome, kind):
    tmp, results = outcome
    ok(results[f"following-{kind}"])
    recorded = decisions(tmp / "runs" / FOLLOWED[kind][0])
    run = tmp / "runs" / f"following-{kind}"
    followed = decisions(run)
    assert followed == [d for d in recorded if d["step"] < FOLLOWING_STEPS]
    assert all(d["digest"] for d in followed)
    own = following(tmp, kind, "method.replay=null", "engine.kind=single", name="own")
    train_only(World(), own.model_dump())
    assert [d["digest"] for d in decisions(own.run_folder)] != [d["digest"] for d in followed]
    assert losses(own.run_folder)[-1] != losses(run)[-1]


def test_a_replay_sets_masks_ranks_and_gates(outcome):
    """The checkpoint after the last step holds what the last decision said."""
    tmp, _ = outcome
    stored = read_tensors(newest(tmp / "runs/following-lelora/checkpoints"))
    last = decisions(tmp / "runs/following-lelora")[-1]
    assert {u: int(stored[f"adapter/{u}/mask"].sum()) for u in last["ranks"]} == last["ranks"]
    place = {"primary": 0, "medium": 8, "minor": 16}
    for unit, location in last["locations"].items():
        bank = stored[f"adapter/{unit}/mask"][place[location] :][:8]
        assert int(bank.sum()) == last["ranks"][unit]
    stored = read_tensors(newest(tmp / "runs/following-weightlora_plus/checkpoints"))
    selection = decisions(tmp / "runs/following-weightlora_plus")[-1]
    held = {n.split("/")[1]: len(t) for n, t in stored.items() if n.endswith("/A")}
    assert held == selection["ranks"] and set(held) == set(selection["survivors"])
    assert set(held) == {name for name, omega in selection["omega"].items() if omega > 0}
    stored = read_tensors(newest(tmp / "runs/following-lalora/checkpoints"))
    last = decisions(tmp / "runs/following-lalora")[-1]
    for name, tensor in stored.items():
        if name.endswith("/mask"):
            assert int(tensor.sum()) == last["ranks"][name.split(".")[2]]


def check_refusal(tmp, name: str, error: str, message: str) -> None:
    assert error == "UserError", message
    for part in ["method.replay", *REFUSED[name][1]]:
        assert part.replace("TMP", str(tmp)) in message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_replay_that_does_not_fit_is_refused(outcome, name):
    """Before anything is trained or written: one line, exit code 2."""
    tmp, _ = outcome
    config = refused(tmp, name, "single")
    with pytest.raises(Exception) as refusal:
        train_only(World(), config.model_dump())
    check_refusal(tmp, name, refusal.typename, str(refusal.value))
    assert refusal.value.exit_code == 2
    assert not config.run_folder.exists(), "a run that never began has a folder"


def test_a_run_that_follows_itself_keeps_its_record(outcome):
    """Killed before its first checkpoint, then started again with its own record to follow."""
    tmp, _ = outcome
    own = ["method.kind=lelora", "run.steps=4", "engine.kind=single"]
    config = configuration(tmp, "itself", *own)
    train_only(World(), config.model_dump())
    shutil.rmtree(config.run_folder / "checkpoints")
    record = decisions(config.run_folder)
    again = configuration(tmp, "itself", *own, f"method.replay={config.run_folder}")
    with contextlib.suppress(UserError):
        train_only(World(), again.model_dump())
    assert decisions(config.run_folder) == record


@pytest.mark.parametrize("name", TOGETHER)
def test_a_replay_that_does_not_fit_stops_every_rank(outcome, name):
    tmp, results = outcome
    ranks = results[f"refused-{name}"]
    speaking = [rank for rank in ranks if rank["error"] != "FailedElsewhere"]
    assert len(speaking) == 1
    check_refusal(tmp, name, speaking[0]["error"], speaking[0]["message"])
    for rank in ranks:
        assert rank["exit_code"] == 2 and rank["seconds"] < 20


def test_a_method_that_decides_nothing_cannot_follow(tmp_path):
    started = time.perf_counter()
    for kind in ("lora", "pissa", "milora"):
        with pytest.raises(
            UserError, match=rf"method\.replay: .*{kind} decides nothing"
        ) as refusal:
            quick_config(tmp_path, f"method.kind={kind}", "method.replay=runs/other")
        assert refusal.value.exit_code == 2
    assert time.perf_counter() - started < 5
