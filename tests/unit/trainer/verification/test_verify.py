"""Sound runs pass, in a line, and a proof changes nothing of what is trained."""

import itertools
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import losses, quick_config, sample, save_mixture, save_random_model
from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.loading.probes import differences, probe
from trainer.model.backbone import class_name
from trainer.run.run import run
from trainer.session import open_session
from trainer.verification.verify import verify_session

METHODS, FORMATS = ["lora", "lelora", "pissa"], ["none", "nf4", "int8"]
MODELS, DTYPES = ["mixtral", "gemma2", "qwen2"], ["float32", "bfloat16"]


IN_TURN = [("lora", "nf4"), ("lelora", "none"), ("pissa", "int8")]


@pytest.mark.parametrize("case", sample(itertools.product(METHODS, FORMATS), *IN_TURN))
def test_sound_runs_pass_in_every_format(tmp_path, case):
    kind, weight_format = case
    overrides = f"method.kind={kind}", f"model.quantization={weight_format}"
    session = open_session(quick_config(tmp_path, "run.verify=auto", *overrides), World())
    assert verify_session(session).line.startswith("38 tensors as loaded, 28 adapters'")


@pytest.mark.parametrize(
    "case",
    sample(itertools.product(MODELS, DTYPES), ("mixtral", "bfloat16"), ("gemma2", "float32")),
)
def test_sound_models_pass_packed(tmp_path, case):
    model_type, dtype = case
    save = save_mixture if model_type == "mixtral" else save_random_model
    kind = () if model_type == "mixtral" else (AutoModelForCausalLM,)
    folder = save(tmp_path / "model", model_type, *kind)
    overrides = f"model.id={folder}", "data.packing=true", f"model.dtype={dtype}"
    said = verify_session(
        open_session(quick_config(tmp_path, "run.verify=auto", *overrides), World())
    ).line
    assert re.search(r"64 and 53 tokens packed and padded against \w+ForCausalLM of transf", said)


@pytest.mark.parametrize("kind", sample(["lora", "lelora", "adalora", "pissa", "dylora"], "lelora"))
def test_losses_do_not_depend_on_the_proof(tmp_path, kind):
    found = {}
    for mode in ("auto", "full", "off"):
        config = quick_config(
            tmp_path, f"run.name={mode}", f"run.verify={mode}", f"method.kind={kind}",
            "method.dropout=0.1", "data.max_length=128", "run.steps=2",
        )  # fmt: skip
        run(config, World())
        found[mode] = losses(config.run_folder)
    assert found["auto"] == found["full"] == found["off"]


def test_a_proof_leaves_the_session_as_it_was(tmp_path):
    session = open_session(quick_config(tmp_path, "run.verify=auto", "method.dropout=0.1"), World())
    before = torch.get_rng_state(), session.optimizer.values.clone(), session.model.training
    adapters = {
        name: session.method.adapters.layers[name].adapter for name in session.method.adapters
    }
    verify_session(session)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(session.optimizer.values, before[1])
    assert session.model.training is before[2] is True
    layers = session.method.adapters.layers
    assert all(layers[name].adapter is adapter for name, adapter in adapters.items())
    assert not any(p.is_meta for p in session.model.parameters())
    assert not any(module._forward_hooks for module in session.model.modules())


def test_one_line_says_what_was_verified(tmp_path, capsys):
    shown = "log.progress=plain"
    for overrides, said in (
        (("run.steps=1",), r"38 tensors as loaded, .* in \d\.\d s"),
        (("run.steps=2",), "before: resumed on the same backbone, versions, engine and ranks"),
        (("run.steps=3", "run.verify=full"), "38 tensors as loaded, .*"),
        (("run.steps=4", "run.verify=off"), "no: run.verify=off"),
        (("run.steps=5",), "before: resumed on .*"),
        (("run.steps=6", "model.dtype=bfloat16"), "38 tensors as loaded, .*"),
    ):
        run(
            quick_config(tmp_path, "run.verify=auto", "optim.schedule=constant", shown, *overrides),
            World(),
        )
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if line.startswith("verified")]
        assert re.fullmatch(f"verified  {said}", line)


def test_a_resumed_run_that_was_never_proved_is(tmp_path, capsys):
    """As after `run.verify: off`, another version of a library, or a checkpoint of before."""
    for mode, step in (("off", 1), ("auto", 2), ("auto", 3)):
        run(
            quick_config(
                tmp_path, f"run.verify={mode}", f"run.steps={step}", "log.progress=plain",
                "optim.schedule=constant",
            ),
            World(),
        )  # fmt: skip
        said = re.findall(r"^verified  (\w+)", capsys.readouterr().out, re.MULTILINE)
        state = json.loads(
            (tmp_path / f"runs/quickstart/checkpoints/step-{step:08d}/state.json").read_text()
        )
        assert said == {1: ["no"], 2: ["38"], 3: ["before"]}[step]
        assert (state["verified"] is None) == (step == 1)


def test_off_needs_no_quotes(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("run:\n  verify: off\nmodel:\n  id: m\ndata:\n  train: t\n")
    assert load_config(file).run.verify == "off"
    assert load_config(file, ["run.verify=full"]).run.verify == "full"


def test_probes_see_every_row():
    value = torch.randn(1000, 33)
    expected = probe(value)
    assert expected.shape == (2, 250) and differences(probe(value.clone()), expected).max() == 0
    for row in (0, 499, 999):
        changed = value.clone()
        changed[row] += 0.1 * torch.randn(33)
        assert (differences(probe(changed), expected) > 1e-4).nonzero().tolist() == [[row // 4]]
    assert (differences(probe(value.roll(1, 0)), expected) > 1e-2).all()
    assert differences(probe(value.fill_(float("nan"))), expected).isnan().all()
    assert probe(torch.tensor(2.0)).shape == (2, 1)
    zeros = probe(torch.zeros(300, 2))
    assert differences(zeros, zeros).max() == 0
    assert differences(probe(torch.ones(300, 2)), zeros).min() == torch.inf


def test_swapped_rows_are_found_beside_a_huge_one():
    value = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    value[7] *= 1e30
    swapped = value.clone()
    swapped[[20, 150]] = value[[150, 20]]
    far = differences(probe(swapped), probe(value)) > 1e-4
    assert far.nonzero().flatten().tolist() == [20, 150]
    assert probe(value).isfinite().all()


@pytest.mark.parametrize("weight_format", sample(["none", "nf4", "int8", "fp8"], "nf4", "fp8"))
def test_sound_models_of_16_bits_pass(tmp_path, weight_format):
    overrides = "model.dtype=bfloat16", f"model.quantization={weight_format}", "data.packing=true"
    config = quick_config(tmp_path, "run.verify=auto", *overrides)
    assert verify_session(open_session(config, World())).complete


def test_a_class_keeps_its_name_under_a_sharder():
    model = torch.nn.Linear(2, 2)
    sharded = type("FSDPLinear", (torch.nn.Linear,), {"__module__": "torch.distributed.fsdp"})
    model.__class__ = sharded
    assert class_name(model) == "Linear"
