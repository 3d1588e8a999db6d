"""Second stages: what was learned is where the next run starts, and what is exported is all of it."""

import dataclasses
import json
import os
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters.layers.linear import AdaptedLinear
from tests.helpers import losses, quick_config, sample, save_mixture, save_random_model
from trainer.checkpoint.saved import read_saved
from trainer.checkpoint.state import load_trained
from trainer.config.config import with_overrides
from trainer.device_memory import readable
from trainer.distributed.world import World
from trainer.errors import BadCheckpoint, UserError
from trainer.export.export import export_run
from trainer.records.progress import Progress
from trainer.run.dry_run import dry_run
from trainer.run.finish import finish
from trainer.run.run import run
from trainer.run.second_stage import SecondStage
from trainer.session import open_session
from trainer.verification.verify import verify_session

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
USUAL = [GOES_ON[3], STAYS[3]]  # a third stage below splits W beside what is frozen


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


@pytest.mark.parametrize("source", sample(["adapter", "checkpoints/step-00000004"], "adapter"))
def test_a_third_stage_starts_from_the_second(place, source):
    config = second(place, "stage-two", "rank 2", trained(place, "lora").run_folder)
    folder = config.run_folder / source
    third = second(place, "stage-three", "pissa", folder, "run.steps=1")
    assert evaluations(third)[0] == pytest.approx(evaluations(config)[-1], rel=1e-5)
    check_export(third)
    shutil.rmtree(third.run_folder)
    # The export is one LoRA: it goes on as one of the sum of all ranks.
    session, _ = opened(
        configured(place, "x", f"model.adapter={config.run_folder}/adapter", "method.rank=6")
    )
    assert session.frozen == {}
    expected = own_logits(config)
    assert (start_logits(session) - expected).abs().max() <= 1e-5 * expected.abs().max()
    shutil.rmtree(config.run_folder)


@pytest.mark.parametrize("first", sample(["lora", "pissa"], "pissa"))
def test_resumed_without_the_first_stage(place, tmp_path, first):
    """The frozen part and what was taken out of W are the run's own."""
    source = shutil.copytree(trained(place, first, "nf4").run_folder, tmp_path / "source")
    names = ["model.quantization=nf4", "checkpoint.every=2"]
    whole = second(place, f"whole-after-{first}", "rank 2", source, *names)
    shutil.rmtree(source)
    other = with_overrides(whole, [f"run.name=killed-after-{first}"])
    shutil.copytree(whole.run_folder, other.run_folder)
    shutil.rmtree(other.run_folder / "checkpoints/step-00000004")
    run(other, World())
    assert losses(other.run_folder) == losses(whole.run_folder)
    tensors = [read_saved(config.run_folder).tensors for config in (whole, other)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    check_export(other)
    export_run(other.run_folder, tmp_path / "merged", World(), what="merged", measure=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(ids()).logits, own_logits(other), rtol=1e-4, atol=1e-4)
    with pytest.raises(BadCheckpoint, match=r"model\.adapter: .* was made with"):
        run(with_overrides(other, ["model.adapter=another"]), World())
    if first == "pissa":  # which this method cannot compute again
        (other.run_folder / "initial.safetensors").write_bytes(b"")
        with pytest.raises(BadCheckpoint, match=r"initial\.safetensors: checksum differs"):
            run(other, World())


def peft_adapter(model, folder, config, head=None):
    """An adapter of PEFT with random factors, saved; logits of PEFT's own model."""
    torch.manual_seed(3)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
        made.save_pretrained(folder)
        return made.eval()(ids()).logits


def opened(config):
    """A session at the start of a second stage, and the lines that it logs."""
    stage = SecondStage(config, World())
    session = open_session(config, World(), stage.initial_adapters, frozen=stage.frozen)
    return session, stage.begin(session)


@torch.no_grad()
def start_logits(session):
    session.model.eval()
    return session.model(ids()).logits


@pytest.mark.parametrize(
    "model_type", sample(["llama", "gpt2", "mixtral", "gpt_oss"], "llama", "mixtral")
)
def test_an_adapter_of_peft(tmp_path, model_type):
    patterns = {"rank_pattern": {r"layers\.1\.mlp\.up_proj": 5, "v_proj": 2}, "lora_alpha": 12,
                "alpha_pattern": {"v_proj": 3}, "use_rslora": True}  # fmt: skip
    options = {
        "llama": {"target_modules": ["q_proj", "v_proj", "up_proj"], **patterns},
        "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "mixtral": {"target_modules": ["q_proj"], "lora_alpha": 3, "target_parameters": [
            "experts.gate_up_proj", "experts.down_proj"]},
        "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    }[model_type]  # fmt: skip
    folder = tmp_path / "model"
    if model_type in ("mixtral", "gpt_oss"):
        save_mixture(folder, model_type)
    else:
        save_random_model(folder, model_type, AutoModelForCausalLM)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = model(ids()).logits
    expected = peft_adapter(model, tmp_path / "a", peft.LoraConfig(r=4, **options))
    assert (expected - plain).abs().max() > 1e-2
    config = configured(
        tmp_path, "second", f"model.adapter={tmp_path}/a", *METHODS["rank 2"], "data.eval=null",
        "run.eval_at_start=false",
    )  # fmt: skip
    session, lines = opened(config)
    assert (start_logits(session) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert "stays, frozen, beside the new lora" in lines[-1]


def test_a_dry_run_says_how_it_is_taken_over(place):
    source = trained(place, "lora").run_folder
    for method, said in (
        ("lora", "goes on with"),
        ("lelora", "stays, frozen, beside the new lelora"),
    ):
        text = dry_run(configured(place, "x", f"model.adapter={source}", *METHODS[method]), World())
        line = next(line for line in text.splitlines() if line.startswith("adapter "))
        assert str(source) in line and "lora, 14 matrices of rank 4" in line and said in line
        adapters = read_saved(source).tensors
        nbytes = sum(
            adapters[name].nbytes for name in adapters if re.match("adapter/.*/[AgB]$", name)
        )
        assert (f"earlier stages    {readable(nbytes)}" in text) == (method == "lelora")


def test_the_proof_knows_of_the_frozen_part(place, monkeypatch):
    source = trained(place, "lora").run_folder
    config = configured(place, "x", f"model.adapter={source}", *METHODS["rank 2"])
    assert verify_session(opened(config)[0]).complete
    monkeypatch.setattr(AdaptedLinear, "_fixed", lambda self, dtype: [])
    with pytest.raises(UserError, match=r"model\.layers\.0"):
        verify_session(opened(config)[0])


def test_an_even_adapter_of_peft_goes_on_as_it_is(place, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    given = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    expected = peft_adapter(model, tmp_path / "a", given)
    session, lines = opened(
        configured(place, "even", f"model.adapter={tmp_path}/a", *METHODS["q and v"])
    )
    assert session.frozen == {} and "goes on with" in lines[-1]
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    for name, adapter in session.method.adapters.items():
        assert torch.equal(adapter.A, stored[f"base_model.model.{name}.lora_A.weight"])
    assert (start_logits(session) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("experts", sample(["stacked", "per_expert"], "per_expert"))
def test_experts_of_an_export(tmp_path, experts):
    save_mixture(tmp_path / "model", "qwen3_moe")
    quiet = ["data.eval=null", "run.eval_at_start=false", "run.steps=2", "run.verify=off"]
    first = configured(tmp_path, "first", *METHODS["rank 2"], *quiet)
    run(first, World())
    export_run(first.run_folder, tmp_path / "a", World(), experts=experts)
    starts = [
        start_logits(opened(configured(
            tmp_path, "second", f"model.adapter={source}", *METHODS[method], *quiet
        ))[0])
        for source, method in (
            (first.run_folder, "rank 2"), (tmp_path / "a", "pissa"),
        )
    ]  # fmt: skip
    expected = own_logits(first)
    for found in starts:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def classification(place, name, *overrides):
    rows = [f"text {word},{'xyz'[i % 3]}" for i, word in enumerate("abcdefghijklmnopqr")]
    for file, texts in (("l.csv", rows), ("two.csv", [row for row in rows if row[-1] != "z"])):
        (place / file).write_text("text,label\n" + "\n".join(texts) + "\n")
    return configured(
        place, name, "task.kind=sequence_classification", f"data.train={place}/l.csv",
        "data.eval=null", "run.eval_at_start=false", "run.verify=off", *METHODS["lora"], *overrides,
    )  # fmt: skip


def test_trained_heads_are_taken_over(place, tmp_path):
    first = classification(place, "classes")
    run(first, World())
    expected = own_logits(first)
    for source, rank in ((first.run_folder, 2), (first.run_folder / "adapter", 4)):
        session, lines = opened(
            classification(place, "more", f"model.adapter={source}", f"method.rank={rank}")
        )
        found = start_logits(session)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert bool(session.frozen) == (rank == 2) and lines[-1].endswith("with score")
    fewer = classification(
        place, "fewer", f"model.adapter={first.run_folder}", f"data.train={place}/two.csv"
    )
    with pytest.raises(UserError, match=r"score\.weight \(3, 64\) was trained in full"):
        opened(fewer)
    lm = configured(place, "lm", f"model.adapter={first.run_folder}", *METHODS["lora"])
    with pytest.raises(UserError, match=r"score\.weight .* was trained in full"):
        opened(lm)
    (place / "l.csv").write_text((place / "l.csv").read_text().replace(",z", ",w"))
    with pytest.raises(UserError, match="trained for other labels"):
        opened(with_overrides(fewer, [f"data.train={place}/l.csv"]))


def test_an_adapter_of_another_model_is_refused(place, tmp_path):
    source = trained(place, "lora").run_folder
    save_random_model(
        tmp_path / "model", "llama", AutoModelForCausalLM, intermediate_size=128, seed=1
    )
    for one in (source, source / "adapter"):
        config = configured(tmp_path, "wider", f"model.adapter={one}", *METHODS["lora"])
        with pytest.raises(UserError, match=r"mlp\.\w+ is for a matrix of .*96.* accepted: an ad"):
            run(config, World())
        assert not config.run_folder.exists()
    shutil.rmtree(tmp_path / "model")
    save_random_model(tmp_path / "model", "gpt2", AutoModelForCausalLM)
    with pytest.raises(UserError, match=r"_proj is no matrix of GPT2LMHeadModel"):
        run(configured(tmp_path, "gpt2", f"model.adapter={source}", *METHODS["lora"]), World())
    shutil.rmtree(tmp_path / "model")
    save_random_model(tmp_path / "model", "llama", AutoModelForCausalLM, seed=1)
    with pytest.raises(UserError, match="was trained on another backbone"):
        run(configured(tmp_path, "other", f"model.adapter={source}", *METHODS["lora"]), World())


def test_folders_that_are_no_adapters(place, tmp_path):
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    for path in (empty, tmp_path / "absent", place / "model"):
        with pytest.raises(UserError, match=r"no adapter_config\.json, and no checkpoint; accept"):
            run(configured(place, "x", f"model.adapter={path}", *METHODS["lora"]), World())
    good = trained(place, "lora").run_folder / "adapter"
    for file, match in (
        ("adapter_model.safetensors", r"no adapter_model\.safetensors"),
        ("adapter_config.json", "no adapter_config"),
    ):
        bad = shutil.copytree(good, tmp_path / file)
        (bad / file).unlink()
        with pytest.raises(UserError, match=match):
            run(configured(place, "x", f"model.adapter={bad}", *METHODS["lora"]), World())


def test_a_named_pipe_is_not_waited_for(place, tmp_path):
    bad = shutil.copytree(trained(place, "lora").run_folder / "adapter", tmp_path / "a")
    (bad / "adapter_model.safetensors").unlink()
    os.mkfifo(bad / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is no regular file"):
        run(configured(place, "x", f"model.adapter={bad}", *METHODS["lora"]), World())


def test_a_folder_that_is_a_run_on_another_host(place):
    """All ranks must know before they read it, each in its own way."""

    class Hosts(World):
        def _gather_messages(self, value):
            return [value, [None, ["folder"]]]

    config = configured(place, "x", f"model.adapter={trained(place, 'lora').run_folder}")
    with pytest.raises(UserError, match="not the same for every rank; accepted: the same on"):
        SecondStage(config, Hosts())


def test_what_began_as_a_part_of_w_and_has_become_nothing_is_a_change(place, tmp_path):
    source = trained(place, "pissa").run_folder
    saved = read_saved(source)
    unit = next(iter(saved.initial_adapters))
    saved.tensors[f"adapter/{unit}/g"].zero_()
    config = configured(place, "x", f"model.adapter={source}", *METHODS["rank 2"])
    stage = SecondStage(config, World())
    stage._saved = saved
    session = open_session(config, World(), stage.initial_adapters, frozen=stage.frozen)
    stage.begin(session)
    assert session.frozen.keys() == session.method.adapters.keys()
    expected = start_logits(session)
    finish(session, tmp_path, Progress())
    model = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32)
    found = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids()).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_else_was_trained_is_not_dropped_silently(place, monkeypatch):
    source = trained(place, "lora").run_folder

    def more(path, world):
        saved = read_saved(path)
        return dataclasses.replace(saved, tensors={**saved.tensors, "other/embed": torch.ones(1)})

    monkeypatch.setattr("trainer.run.second_stage.read_on_all", more)
    with pytest.raises(UserError, match="other/embed was trained beside its adapters"):
        opened(configured(place, "x", f"model.adapter={source}", *METHODS["rank 2"]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("peft_type", "IA3"), ("bias", "all"), ("lora_bias", True),
        ("init_lora_weights", "pissa"), ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [5]), ("r", 3), ("rank_pattern", "x"), ("r", "x"),
    ],
)  # fmt: skip
def test_more_than_a_plain_lora_is_refused_by_name(place, tmp_path, key, value):
    bad = shutil.copytree(trained(place, "lora").run_folder / "adapter", tmp_path / "a")
    given = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**given, key: value}))
    match = rf"{key}: .* more than a plain LoRA"
    if value == "x":
        match = "does not match this configuration"
    elif key == "r":
        match = "has rank 4, its .* says 3"
    with pytest.raises(UserError, match=match):
        opened(configured(place, "x", f"model.adapter={bad}", *METHODS["lora"]))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "is no factor of a linear"),
        ("base_model.model.model.norm.weight", r"model\.norm\.weight .* was trained in full"),
        ("base_model.model.model.layers.7.mlp.up_proj", r"layers\.7\.mlp\.up_proj is no matrix"),
    ],
)
def test_tensors_that_this_model_does_not_take(place, tmp_path, name, match):
    bad = shutil.copytree(trained(place, "lora").run_folder / "adapter", tmp_path / "a")
    tensors = load_file(bad / "adapter_model.safetensors")
    if name.endswith("up_proj"):
        tensors |= {f"{name}.lora_A.weight": torch.ones(4, 64),
                    f"{name}.lora_B.weight": torch.ones(96, 4)}  # fmt: skip
    else:
        tensors[name] = torch.ones(64)
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(UserError, match=match):
        opened(configured(place, "x", f"model.adapter={bad}", *METHODS["lora"]))
