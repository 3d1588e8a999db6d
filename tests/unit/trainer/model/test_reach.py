"""Layers whose output never reaches the loss get no adapters; the others all do."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig

from adapters.layers.expert_modules import AdaptedExperts, experts_form
from adapters.unit import stem
from adapters.units import is_linear
from tests.helpers import TASK_OF, TINY, losses, quick_config, thorough
from tests.tiny_models import (
    CAUSAL,
    CLASSIFICATION,
    EOS,
    PAIRS,
    PARTS,
    architectures,
    not_buildable,
    save_tiny,
    tiny_model,
)
from trainer.checkpoint import store
from trainer.checkpoint.saved import read_saved
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.model import build as building
from trainer.model.backbone import BuiltModel
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.model.reach import find_unreached, summarised
from trainer.model.shape_mode import ShapeMode
from trainer.run.run import run
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.registry import TASKS
from trainer.training.evaluation import evaluate_saved

REASON = "their output does not reach the loss of a text"
LEFT_OUT = {
    (CAUSAL, "llama"): [],
    (CAUSAL, "gpt2"): [],
    (CAUSAL, "bart"): ["model.decoder.layers.*.encoder_attn"],
    (CAUSAL, "big_bird"): ["bert.pooler"],
    (CAUSAL, "gemma3"): ["model.vision_tower"],
    (CAUSAL, "deepseek_v32"): ["model.layers.*.self_attn.indexer"],
    (CAUSAL, "dbrx"): [],
    (CLASSIFICATION, "lilt"): [
        "lilt.encoder.layer.1.attention.layout_output",
        "lilt.encoder.layer.1.attention.self.layout_value",
        "lilt.encoder.layer.1.layout_intermediate",
        "lilt.encoder.layer.1.layout_output",
    ],
}
TIED = ("zamba", "zamba2")
"""Their blocks share matrices: one that reaches the loss does so for all."""


def config_of(tmp_path, name: str, part: str = CAUSAL, *changes: str) -> Config:
    save_tiny(tmp_path / "model", name, part)
    task = [f"task.kind={TASK_OF[part]}", "data.label=label"] if part != CAUSAL else []
    return quick_config(
        tmp_path, f"model.id={tmp_path / 'model'}", "method.rank=4", "data.max_length=128",
        "method.targets=all-linear", *task, *changes,
    )  # fmt: skip


def built(config: Config, left_out: list[str] | None = None) -> BuiltModel:
    task = TASKS[config.task.kind](config.task, load_tokenizer(config.model))
    task.learn_labels(["0", "1"])
    return build(config, task, torch.device("cpu"), left_out)


def without_gradient(name: str, part: str) -> set[str]:
    """Linear layers and stacks of experts whose gradient is zero in transformers' own model."""
    model = tiny_model(name, part)
    ids = torch.randint(4, 512, (2, 32), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = EOS
    inputs = {"input_ids": ids}
    if part != CAUSAL:
        inputs["attention_mask"] = torch.ones_like(ids)
    if part == PAIRS:
        inputs["decoder_input_ids"] = ids
    logits = model(**inputs, **({} if part == CLASSIFICATION else {"use_cache": False})).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits.float().log_softmax(-1) * weights).sum().backward()
    found = set()
    for path, module in model.named_modules():
        matrices = {path: module.weight} if is_linear(module) else {}
        if AdaptedExperts.fits(module):
            stacks = experts_form(module).stacks
            matrices = {f"{path}.{stack}": getattr(module, stack) for stack in stacks}
        found |= {p for p, m in matrices.items() if m.grad is None or not bool(m.grad.any())}
    return found


@pytest.mark.parametrize(("part", "name"), LEFT_OUT, ids=lambda value: value)
def test_all_linear_leaves_out_what_does_not_reach_the_loss(part, name, tmp_path):
    config = config_of(tmp_path, name, part)
    found = built(config)
    notes = [note for note in found.left_alone if note.reason == REASON]
    assert [path for note in notes for path in note.paths] == LEFT_OUT[part, name]
    assert not {unit.name for unit in found.units} & set(found.unreached)
    dead = without_gradient(name, part) & (found.adapted_layers.keys() | set(found.unreached))
    assert {stem(path) for path in found.unreached} == dead


@thorough
@pytest.mark.parametrize("part", PARTS)
def test_what_is_left_out_has_no_gradient_in_any_architecture(part, tmp_path):
    wrong = {}
    for name in architectures(part):
        if not_buildable(name, part) or name in TIED:
            continue
        try:
            dead = without_gradient(name, part)
        except Exception:  # no training without more inputs
            continue
        try:
            found = built(config_of(tmp_path / name, name, part))
        except UserError:
            continue
        stacks = {path.rpartition(".")[0] for path in found.unreached}
        alive = {path for path in found.unreached if path not in dead}
        alive = {path for path in alive if path.rpartition(".")[0] not in dead & stacks}
        if alive:
            wrong[name] = sorted(alive)[:3]
    assert not wrong


def test_suffixes_name_the_layers_that_reach_the_loss(tmp_path):
    found = built(config_of(tmp_path, "bart", CAUSAL, "method.targets=[q_proj,v_proj]"))
    assert {unit.kind for unit in found.units} == {"self_attn.q_proj", "self_attn.v_proj"}
    (note,) = found.left_alone
    assert list(note.paths) == [
        "model.decoder.layers.*.encoder_attn.q_proj", "model.decoder.layers.*.encoder_attn.v_proj"
    ]  # fmt: skip


def test_targets_none_of_which_reaches_the_loss_are_refused(tmp_path):
    config = config_of(tmp_path, "bart", CAUSAL, "method.targets=.*encoder_attn.*")
    with pytest.raises(UserError, match=r"^method\.targets: '\.\*encoder_attn\.\*' picks only"):
        built(config)


def test_such_a_model_trains_and_the_note_names_them(tmp_path, capsys):
    run(config_of(tmp_path, "bart", CAUSAL, "run.verify=auto", "log.progress=plain"), World())
    printed = capsys.readouterr().out
    assert f"note      no adapters on model.decoder.layers.*.encoder_attn: {REASON}" in printed
    assert "adapters without effect" not in printed


def test_a_checkpoint_says_what_was_left_out(tmp_path, monkeypatch):
    """An earlier run, or one with another version of transformers, goes on with its own units."""
    config = config_of(tmp_path, "bart", CAUSAL, "run.steps=2", "checkpoint.every=1")
    with monkeypatch.context() as patch:
        patch.setattr(building, "find_unreached", lambda *_: set())
        run(config, World())
    saved = config.run_folder / "checkpoints/step-00000002"
    state = json.loads((saved / "state.json").read_text())
    assert state.pop("unreached") == []
    (saved / "state.json").write_text(json.dumps(state))  # as earlier ones were
    (saved / "manifest.json").unlink()
    store.write_manifest(saved)
    assert evaluate_saved(config, World(), read_saved(saved))["eval_loss"] > 0
    longer = config.model_copy(update={"run": config.run.model_copy(update={"steps": 3})})
    run(longer, World())
    assert len(losses(config.run_folder)) == 3
    state = json.loads((config.run_folder / "checkpoints/step-00000003/state.json").read_text())
    assert state["unreached"] == []


class Again(torch.autograd.Function):
    """Computes its layer once more in the backward pass, as reversible blocks do."""

    @staticmethod
    def forward(ctx, x, layer):
        return layer(x)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class Toy(nn.Module):
    """One layer for each way in which an output is used."""

    def __init__(self):
        super().__init__()
        self.config = PretrainedConfig()
        self.embedding = nn.Embedding(512, 8)
        for name in ("used", "in_place", "unused", "chosen", "overrun", "again"):
            setattr(self, name, nn.Linear(8, 8))
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("table", torch.zeros(3))
        self.seen = {}
        self.again_used = False

    def forward(self, input_ids, **_):
        x = self.embedding(input_ids)
        y = self.used(x)
        view = self.in_place(x.transpose(0, 1))
        view /= 2
        self.unused(x)
        self.seen["ids"], self.mask = input_ids, x
        self.table += 1
        with torch.no_grad():
            number = self.chosen(x).argmax(-1)
        y = y + view.transpose(0, 1) + F.one_hot(number, 8)
        experts = x[..., :4].topk(1).indices
        for expert in experts.unique():
            rows, columns, _ = torch.where(experts == expert)
            y[rows, columns] += self.experts[int(expert)](x[rows, columns])
        if input_ids.shape[1] > 40:
            y = y + self.overrun(x)
        if bool((x > 0).any()) and self.again_used:
            y = Again.apply(y, self.again)
        return SimpleNamespace(logits=y)


class ToyTask(CausalLM):
    def loss(self, model, batch):
        return model(**batch.inputs).logits.sum(), None


def toys(**changes) -> tuple[Toy, ToyTask, list[str]]:
    with torch.device("meta"):
        model = Toy()
    model.table = torch.zeros(3)
    model.requires_grad_(False)
    vars(model).update(changes)
    task = ToyTask(CausalLM.Options(), AutoTokenizer.from_pretrained(TINY))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return model, task, names


def test_every_use_of_an_output_is_told_apart():
    model, task, names = toys()
    assert find_unreached(model, task, names, 1024) == {"unused", "chosen", "again"}
    assert find_unreached(model, task, names, 32) == {"unused", "chosen", "again", "overrun"}


def test_layers_that_a_function_of_the_model_computes_again_count_as_reached():
    model, task, names = toys(again_used=True)
    assert find_unreached(model, task, names, 1024) == {"unused"}


def test_a_model_that_does_not_run_without_values_is_left_to_the_first_steps():
    model, task, names = toys(forward=lambda input_ids: model.embedding(input_ids).numpy())
    assert find_unreached(model, task, names, 1024) == set()


def test_the_model_and_the_random_state_are_as_before():
    model, task, names = toys()
    before, attributes = torch.get_rng_state(), {*vars(model)}
    find_unreached(model, task, names, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert {*vars(model)} == attributes and model.seen == {}
    assert torch.equal(model.table, torch.zeros(3))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_paths_are_short_where_that_is_unambiguous():
    names = [f"m.{i}.{part}.{x}" for i in range(3) for part in ("self", "cross") for x in "qk"]
    names += ["tower.0.self.q", "tower.1.self.q", "head"]
    cross = [name for name in names if "cross" in name]
    tower = ["tower.0.self.q", "tower.1.self.q"]
    assert summarised(names, [*cross, *tower]) == ["m.*.cross", "tower"]
    assert summarised(names, ["m.1.self.q", "m.1.self.k", "head"]) == ["head", "m.1.self"]
    assert summarised(names, [name for name in names if name.endswith("self.q")]) == [
        "m.*.self.q", "tower"
    ]  # fmt: skip


def test_choices_are_spread_and_questions_answered():
    x = torch.randn(5, 4, device="meta")
    with ShapeMode():
        values, chosen = x.topk(2, dim=-1)
        assert values.is_meta and not chosen.is_meta
        assert sorted(set(chosen.flatten().tolist())) == [0, 1, 2, 3]
        assert all(len(set(row)) == 2 for row in chosen.tolist())
        assert sorted(set(x.argmax(0).tolist())) == [0, 1, 2, 3]
        assert x.sort(dim=0).indices[:, 1].tolist() == [0, 1, 2, 3, 4]
        assert bool((x > 0).all()) and not bool(x.isnan().any())
        assert x[x > 0].shape == (20,)
        assert torch.arange(3, device=x.device).tolist() == [0, 1, 2]
        assert float(x.sum()) == 1.0
