"""PEFT's own adapters against PEFT's own training loop, and full fine-tuning against a plain one: on
one process and on two, sharded or not, resumed, exported."""

import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import ALL, ROOT, losses, quick_config, sample, save_random_model
from tests.world.cases import ok, run_cases
from tests.world.worker import cut_run, train
from trainer.checkpoint.store import newest, read_tensors
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.session import open_session
from trainer.tasks.base import IGNORED
from trainer.training.loop import make_loader

STEPS, SAVED = 4, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    "dora": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True},
    "vera": {"peft_type": "VERA", "r": 16},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 16},
}
CONFIGS = {
    "LORA": peft.LoraConfig, "VERA": peft.VeraConfig, "IA3": peft.IA3Config, "OFT": peft.OFTConfig
}  # fmt: skip
ENGINES = ("ddp", "fsdp2")
EVERY = [(kind, engine) for kind in KINDS for engine in ENGINES]
USUAL = [("dora", "fsdp2"), ("vera", "fsdp2"), ("lora", "ddp")]
RESUMED = list(KINDS) if ALL else ["vera"]


def configuration(tmp: Path, kind: str, engine: str, *more: str, name: str = "") -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name or f'{kind}-{engine}'}",
        f"run.steps={STEPS}", f"engine.kind={engine}", "method.kind=peft",
        f"method.peft={KINDS[kind]}", f"method.targets={TARGETS}", "optim.learning_rate=1e-2",
        "optim.schedule=constant", "optim.weight_decay=0.1", f"checkpoint.every={SAVED}",
        "data.eval=null", "run.verify=auto", *more,
    )  # fmt: skip


def trained_by_torch(config: Config, model: nn.Module) -> list[float]:
    """Losses of a plain loop of torch and transformers over the batches of a run."""
    session = open_session(config, World())
    batches, optim = make_loader(session, World()), config.optim
    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        parameters, lr=optim.learning_rate, betas=tuple(optim.betas), eps=optim.eps,
        weight_decay=optim.weight_decay,
    )  # fmt: skip
    model.train()
    found = []
    for _ in range(STEPS):
        step, total = batches.next_step(), 0.0
        for _, batch in step.micro_batches:
            targets = batch.targets[:, 1:]
            logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
            learned = targets != IGNORED
            loss = F.cross_entropy(logits[learned], targets[learned], reduction="sum")
            (loss / step.weight).backward()
            total += float(loss.detach()) / step.weight
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        adamw.step()
        adamw.zero_grad()
        found.append(total)
    return found


def by_peft(config: Config, kind: str) -> tuple[list[float], nn.Module]:
    given = dict(KINDS[kind])
    made = CONFIGS[given.pop("peft_type")](target_modules=TARGETS, **given)
    plain = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32)
    torch.manual_seed(config.run.seed)
    wrapped = peft.get_peft_model(plain, made)
    return trained_by_torch(config, wrapped), wrapped


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every kind in one process and in two; some of the latter resumed there and in one."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("baselines")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    for kind in KINDS:
        train(World(), configuration(tmp, kind, "single").model_dump())
    cases: dict[str, Any] = {
        f"{kind}-{engine}": ("train", configuration(tmp, kind, engine).model_dump())
        for kind, engine in (EVERY if ALL else USUAL)
    }
    for kind in RESUMED:
        again = configuration(tmp, kind, "fsdp2", name=f"{kind}-resumed")
        source = str(tmp / "runs" / f"{kind}-fsdp2")
        argument = {"config": again.model_dump(), "source": source, "step": SAVED}
        cases[f"{kind}-resumed"] = "resume", argument
    for results in run_cases(tmp / "work", cases).values():
        ok(results)
    for kind in RESUMED:
        alone = configuration(tmp, kind, "single", name=f"{kind}-moved")
        cut_run(tmp / "runs" / f"{kind}-fsdp2", alone.run_folder, SAVED)
        train(World(), alone.model_dump())
    return tmp


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_adapter_are_those_of_pefts_own_loop(runs, kind):
    config = configuration(runs, kind, "single")
    expected, wrapped = by_peft(config, kind)
    assert losses(config.run_folder) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(runs / "model", dtype=torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        untrained = plain(ids).logits
        loaded = peft.PeftModel.from_pretrained(plain, config.run_folder / "adapter")
        found, wanted = loaded(ids).logits, wrapped.eval()(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("case", sample(EVERY, *USUAL))
def test_two_processes_train_what_one_trains(runs, case):
    kind, engine = case
    one, two = (runs / "runs" / f"{kind}-{where}" for where in ("single", engine))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    expected, found = (read_tensors(newest(run / "checkpoints")) for run in (one, two))
    assert any(name.startswith("trained/") for name in found)
    for name, tensor in expected.items():
        if name.startswith(("trained/", "method/")):
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_is_the_same_to_the_bit_and_moves_to_one_process(runs, kind):
    whole, resumed, moved = (
        runs / "runs" / f"{kind}-{how}" for how in ("fsdp2", "resumed", "moved")
    )
    assert losses(resumed) == losses(whole)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)
    expected, found = (read_tensors(newest(run / "checkpoints")) for run in (whole, resumed))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


FULL = ["fsdp2", "deepspeed"]
MOVES = [("fsdp2", "deepspeed"), ("deepspeed", "fsdp2"), ("fsdp2", "single"), ("single", "fsdp2")]
USUAL_MOVES = MOVES if ALL else MOVES[:1]


def full(tmp: Path, engine: str, name: str = "", *more: str) -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name or f'full-{engine}'}",
        f"run.steps={STEPS}", f"engine.kind={engine}", "method.kind=full",
        "optim.learning_rate=1e-3", "optim.schedule=constant", "optim.weight_decay=0.1",
        f"checkpoint.every={SAVED}", "data.eval=null", "run.verify=auto", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def full_runs(tmp_path_factory) -> tuple[Path, dict[str, list[Any]]]:
    """Full fine-tuning in one process and in two, resumed on the same engine and on others; the
    bytes that each rank holds; and what a gradient that is not finite does."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("full")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    train(World(), full(tmp, "single").model_dump())
    cases: dict[str, Any] = {
        f"full-{engine}": ("train", full(tmp, engine).model_dump()) for engine in ("ddp", *FULL)
    }
    for source, target in [*((engine, engine) for engine in FULL), *USUAL_MOVES]:
        name = f"full-{source}-{target}"
        if target != "single":
            argument = {
                "config": full(tmp, target, name).model_dump(),
                "source": str(tmp / "runs" / f"full-{source}"), "step": SAVED,
            }  # fmt: skip
            cases[name] = "resume", argument
    for engine in FULL:
        cases[f"held-{engine}"] = "held", full(tmp, engine).model_dump()
        cases[f"not-finite-{engine}"] = "not_finite", full(tmp, engine).model_dump()
        low = full(tmp, engine, f"low-{engine}", "model.dtype=bfloat16")
        cases[f"low-{engine}"] = "train", low.model_dump()
    results = {name: ok(found) for name, found in run_cases(tmp / "work", cases).items()}
    alone = {e: ("held", full(tmp, e).model_dump()) for e in FULL}
    held = {f"{e}-1": ok(found) for e, found in run_cases(tmp / "one", alone, 1).items()}
    for source, target in USUAL_MOVES:
        if target == "single":
            moved = full(tmp, target, f"full-{source}-{target}")
            cut_run(tmp / "runs" / f"full-{source}", moved.run_folder, SAVED)
            train(World(), moved.model_dump())
    held |= {f"{e}-2": results[f"held-{e}"] for e in FULL}
    return tmp, held | {f"not-finite-{e}": results[f"not-finite-{e}"] for e in FULL}


def test_full_fine_tuning_has_the_losses_of_a_plain_loop(full_runs):
    tmp, _ = full_runs
    config = full(tmp, "single")
    model = AutoModelForCausalLM.from_pretrained(tmp / "model", dtype=torch.float32)
    expected = trained_by_torch(config, model)
    assert abs(expected[0] - expected[-1]) > 1e-2
    for engine in ("single", "ddp", *FULL):
        assert losses(tmp / "runs" / f"full-{engine}") == pytest.approx(expected, rel=1e-5), engine
    ids = torch.arange(3, 40).unsqueeze(0)
    for engine in ("single", *FULL):
        folder = tmp / "runs" / f"full-{engine}" / "model"
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2
        with torch.no_grad():
            found, wanted = saved(ids).logits, model.eval()(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("engine", FULL)
def test_it_computes_in_bfloat16_and_holds_float32(full_runs, engine):
    runs = full_runs[0] / "runs"
    exact, low = losses(runs / f"full-{engine}"), losses(runs / f"low-{engine}")
    assert low == pytest.approx(exact, rel=0.01) and low != exact
    stored = read_tensors(newest(runs / f"low-{engine}" / "checkpoints"))
    weights = [tensor for name, tensor in stored.items() if name.startswith("trained/")]
    assert all(tensor.dtype == torch.float32 for tensor in weights)
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights)
    saved = AutoModelForCausalLM.from_pretrained(runs / f"low-{engine}" / "model", dtype="auto")
    assert saved.dtype == torch.float32  # as the base's files


@pytest.mark.parametrize("engine", FULL)
def test_full_fine_tuning_resumes_to_the_bit(full_runs, engine):
    whole, resumed = (full_runs[0] / "runs" / f"full-{engine}{e}" for e in ("", f"-{engine}"))
    assert losses(resumed) == losses(whole)
    expected, found = (read_tensors(newest(run / "checkpoints")) for run in (whole, resumed))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("move", sample(MOVES, *USUAL_MOVES), ids="-".join)
def test_full_fine_tuning_moves_to_another_engine_and_number_of_ranks(full_runs, move):
    expected, found = (full_runs[0] / "runs" / f"full-{e}" for e in (move[0], "-".join(move)))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.parametrize("engine", FULL)
def test_a_rank_of_two_holds_half_of_the_weights_gradients_and_moments(full_runs, engine):
    """DeepSpeed has a buffer of one block beside, in which it reduces gradients."""
    model = AutoModelForCausalLM.from_pretrained(full_runs[0] / "model", dtype=torch.float32)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    buffer = block if engine == "deepspeed" else 0
    weights = sum(p.nbytes for p in model.parameters())
    alone = full_runs[1][f"{engine}-1"][0] - buffer
    assert alone == pytest.approx(weights * (5 if engine == "deepspeed" else 4), rel=0.05)
    for rank in full_runs[1][f"{engine}-2"]:
        assert rank - buffer == pytest.approx(alone / 2, rel=0.02)


@pytest.mark.parametrize("engine", FULL)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(full_runs, engine):
    done, spoilt, after = (False, True, True, 1), (True, False, True, 1), (False, True, True, 2)
    for rank in full_runs[1][f"not-finite-{engine}"]:
        assert [tuple(step) for step in rank] == [done, spoilt, after]


PARTS = ("bitfit", "layernorm")
PART_PLACES = [(kind, engine) for kind in PARTS for engine in ("ddp", *FULL)]
USUAL_PARTS = [("bitfit", "fsdp2"), ("bitfit", "deepspeed"), ("layernorm", "deepspeed")]


def part(tmp: Path, kind: str, engine: str, name: str = "") -> Config:
    more = f"method.kind={kind}", "optim.learning_rate=1e-2"
    return full(tmp, engine, name or f"{kind}-{engine}", *more)


@pytest.fixture(scope="module")
def part_runs(tmp_path_factory) -> Path:
    """Biases or norms of a model that has both: in one process and in two, resumed in two."""
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("parts")
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    save_random_model(tmp / "model", "gpt2", AutoModelForCausalLM, **still)
    for kind in PARTS:
        train(World(), part(tmp, kind, "single").model_dump())
    cases: dict[str, Any] = {}
    for kind, engine in PART_PLACES if ALL else USUAL_PARTS:
        cases[f"{kind}-{engine}"] = "train", part(tmp, kind, engine).model_dump()
        again = part(tmp, kind, engine, f"{kind}-{engine}-resumed")
        source = str(tmp / "runs" / f"{kind}-{engine}")
        argument = {"config": again.model_dump(), "source": source, "step": SAVED}
        cases[f"{kind}-{engine}-resumed"] = "resume", argument
    for results in run_cases(tmp / "work", cases).values():
        ok(results)
    return tmp


def selected(kind: str, model: nn.Module) -> set[str]:
    """Names of what the papers train: biases, or all of the LayerNorms."""
    if kind == "bitfit":
        return {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    norms = [path for path, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    return {f"{path}.{name}" for path in norms for name in ("weight", "bias")}


@pytest.mark.parametrize("kind", PARTS)
def test_biases_or_norms_alone_train_as_in_a_plain_loop(part_runs, kind):
    config = part(part_runs, kind, "single")
    model = AutoModelForCausalLM.from_pretrained(part_runs / "model", dtype=torch.float32)
    names = selected(kind, model)
    assert 0 < len(names) < len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    expected = trained_by_torch(config, model)
    assert abs(expected[0] - expected[-1]) > 1e-2
    before = AutoModelForCausalLM.from_pretrained(part_runs / "model").state_dict()
    ids = torch.arange(3, 40).unsqueeze(0)
    for engine in ("single", *(e for k, e in (PART_PLACES if ALL else USUAL_PARTS) if k == kind)):
        folder = part_runs / "runs" / f"{kind}-{engine}"
        assert losses(folder) == pytest.approx(expected, rel=1e-5), engine
        stored = read_tensors(newest(folder / "checkpoints"))
        assert {n.removeprefix("trained/") for n in stored if n.startswith("trained/")} == names
        saved = AutoModelForCausalLM.from_pretrained(folder / "model")
        with torch.no_grad():  # not tensor by tensor: of a key's bias the gradient is rounding only
            found, wanted = saved(ids).logits, model.eval()(ids).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        for name, tensor in saved.state_dict().items():
            assert torch.equal(tensor, before[name]) == (name not in names), name


@pytest.mark.parametrize("place", sample(PART_PLACES, *USUAL_PARTS), ids="-".join)
def test_they_resume_to_the_bit(part_runs, place):
    whole, resumed = (part_runs / "runs" / f"{'-'.join(place)}{end}" for end in ("", "-resumed"))
    assert losses(resumed) == losses(whole)
    expected, found = (read_tensors(newest(run / "checkpoints")) for run in (whole, resumed))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


PLACES = [(e, f) for e in ("ddp", "peer", "fsdp2", "deepspeed") for f in ("none", "nf4", "int8")]
USUAL_PLACES = [("fsdp2", "nf4"), ("deepspeed", "none")]


def dora(tmp: Path, engine: str, fmt: str, name: str = "") -> Config:
    return quick_config(
        tmp, f"model.id={tmp}/model", f"run.name={name or f'dora-{engine}-{fmt}'}",
        f"run.steps={STEPS}", f"engine.kind={engine}", "method.kind=dora",
        f"model.quantization={fmt}", "optim.learning_rate=1e-2", "optim.schedule=constant",
        f"checkpoint.every={SAVED}", "data.eval=null", "run.verify=auto",
        "method.dropout=0.1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def dora_runs(tmp_path_factory) -> Path:
    os.chdir(ROOT)
    tmp = tmp_path_factory.mktemp("dora")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    places = PLACES if ALL else USUAL_PLACES
    for fmt in {fmt for _, fmt in places}:
        train(World(), dora(tmp, "single", fmt).model_dump())
    cases: dict[str, Any] = {}
    for engine, fmt in places:
        cases[f"{engine}-{fmt}"] = "train", dora(tmp, engine, fmt).model_dump()
        again = dora(tmp, engine, fmt, f"dora-{engine}-{fmt}-resumed")
        source = str(tmp / "runs" / f"dora-{engine}-{fmt}")
        argument = {"config": again.model_dump(), "source": source, "step": SAVED}
        cases[f"{engine}-{fmt}-resumed"] = "resume", argument
    for results in run_cases(tmp / "work", cases).values():
        ok(results)
    return tmp / "runs"


@pytest.mark.parametrize("place", sample(PLACES, *USUAL_PLACES), ids="-".join)
def test_dora_is_the_same_on_every_engine_and_resumes_to_the_bit(dora_runs, place):
    engine, fmt = place
    alone, two = (dora_runs / f"dora-{where}-{fmt}" for where in ("single", engine))
    resumed = dora_runs / f"dora-{engine}-{fmt}-resumed"
    assert losses(two) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(resumed) == losses(two)
    expected, found = (read_tensors(newest(run / "checkpoints")) for run in (two, resumed))
    assert any(name.endswith(".magnitude") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
