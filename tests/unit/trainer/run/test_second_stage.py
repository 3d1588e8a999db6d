"""Second stages: what was learned is where the next run starts, and what is exported is all of it."""

import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import quick_config, sample, save_random_model
from trainer.checkpoint.saved import read_saved
from trainer.checkpoint.state import load_trained
from trainer.distributed.world import World
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import open_session

METHODS = {
    "lora": ["method.kind=lora", "method.rank=4"],
    "rank 2": ["method.kind=lora", "method.rank=2"],
    "dropped": ["method.kind=lora", "method.rank=4", "method.dropout=0.2"],
    "pissa": ["method.kind=pissa", "method.rank=3"],
    "milora dropped": ["method.kind=milora", "method.rank=3", "method.dropout=0.2"],
    "lelora": ["method.kind=lelora", "method.rank=3", "method.ranks=[1,2,3]"],
    "lalora": ["method.kind=lalora", "method.rank=4"],
    "weightlora": ["method.kind=weightlora", "method.warmup_steps=2"],
    "adalora": ["method.kind=adalora", "method.tinit=1", "method.tfinal=1", "method.delta_t=1"],
    "dylora": ["method.kind=dylora", "method.rank=3"],
    "q and v": ["method.kind=lora", "method.rank=4", "method.targets=[q_proj, v_proj]"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a backbone of two layers, 14 units."""
    tmp = tmp_path_factory.mktemp("stages")
    save_random_model(tmp / "model", "llama", AutoModelForCausalLM)
    return tmp


def configured(place, name, *overrides):
    return quick_config(
        place, f"model.id={place}/model", f"run.name={name}", "run.steps=4", "data.max_length=64",
        "data.train_records=24", "data.eval_records=8", "data.batch_size=4",
        "data.on_bad_record=skip", "optim.learning_rate=2e-2", "run.eval_at_start=true",
        "run.verify=auto", *overrides,
    )  # fmt: skip


def trained(place, method, quantization="none"):
    """A finished first stage, made once."""
    name = f"{method}-{quantization}".replace(" ", "-")
    config = configured(place, name, f"model.quantization={quantization}", *METHODS[method])
    if not (config.run_folder / "adapter").exists():
        run(config, World())
    return config


def second(place, name, method, source, *overrides):
    config = configured(place, name, f"model.adapter={source}", *METHODS[method], *overrides)
    run(config, World())
    return config


def evaluations(config):
    lines = map(json.loads, (config.run_folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def ids():
    return torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def own_logits(config):
    """Logits of the run's model with what its last checkpoint holds."""
    saved = read_saved(config.run_folder)
    session = open_session(
        config, World(), saved.initial_adapters, [], frozen=lambda _: saved.frozen
    )
    load_trained(session, saved.checkpoint, saved.tensors)
    session.model.eval()
    with session.method.inference():
        return session.model(ids()).logits


@torch.no_grad()
def exported_logits(config, folder):
    """PEFT's, on the original model (dequantised where the run's was quantised)."""
    base = config.model.id
    if config.model.quantization != "none":
        base = folder.parent / f"{config.run.name}-backbone"
        export_run(config.run_folder, base, World(), what="backbone", measure=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()(ids()).logits


def check_export(config):
    expected = own_logits(config)
    found = exported_logits(config, config.run_folder / "adapter")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


GOES_ON = [
    ("lora", "lora", "nf4"), ("dropped", "lora", "none"), ("lelora", "lelora", "nf4"),
    ("weightlora", "weightlora", "none"), ("adalora", "adalora", "none"),
    ("lalora", "lalora", "none"), ("pissa", "pissa", "nf4"), ("dylora", "dylora", "none"),
]  # fmt: skip
STAYS = [
    ("lora", "rank 2", "nf4"), ("lora", "lelora", "none"), ("lalora", "weightlora", "nf4"),
    ("pissa", "lora", "nf4"), ("milora dropped", "q and v", "none"), ("lora", "pissa", "none"),
    ("lelora", "milora dropped", "none"), ("q and v", "weightlora", "none"),
    ("dylora", "dropped", "none"), ("weightlora", "adalora", "int8"),
]  # fmt: skip
USUAL = [GOES_ON[0], GOES_ON[3], STAYS[1], STAYS[3]]


@pytest.mark.parametrize("chain", sample([*GOES_ON, *STAYS], *USUAL), ids=" > ".join)
def test_a_second_stage_starts_where_the_first_ended(place, chain):
    first, method, quantization = chain
    source = trained(place, first, quantization)
    name = f"{source.run.name}-then-{method}".replace(" ", "-")
    config = second(place, name, method, source.run_folder, f"model.quantization={quantization}")
    before, after = evaluations(source)
    assert abs(after - before) > 1e-3, "the first stage changed nothing"
    assert evaluations(config)[0] == pytest.approx(after, rel=1e-5)
    frozen = read_saved(config.run_folder).frozen
    assert bool(frozen) == (chain in STAYS)
    check_export(config)
    assert ("earlier stages" in (config.run_folder / "adapter/README.md").read_text()) == bool(
        frozen
    )
