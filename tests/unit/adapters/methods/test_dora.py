"""`method.kind: dora`: its operator against a dense W', its run and folder against PEFT's DoRA."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adapters.gated import GatedAdapter, Magnitude
from adapters.layers.linear import AdaptedLinear
from tests.helpers import losses, quick_config, save_mixture, save_random_model
from tests.world.test_baselines import trained_by_torch
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import open_session

TARGETS = ["q_proj", "v_proj", "down_proj"]


def configuration(tmp: Path, *more: str) -> Config:
    return quick_config(
        tmp, "method.kind=dora", "method.rank=4", f"method.targets={TARGETS}",
        f"model.id={tmp}/model", "data.eval=null", "run.steps=4", "optim.schedule=constant",
        "optim.learning_rate=1e-2", "optim.weight_decay=0.1", "run.verify=auto", *more,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_the_dense_matrix(bias):
    linear = nn.Linear(24, 40, bias=bias)
    layer = AdaptedLinear(linear, "none")
    layer.weight.requires_grad_(False)
    adapter = GatedAdapter(torch.randn(3, 24), torch.rand(3) + 0.5, torch.randn(3, 40))
    adapter.magnitude = Magnitude(linear.weight)
    adapter.magnitude.m.data.mul_(torch.rand(40) + 0.5)
    layer.adapter, layer.scales_rows = adapter, True
    x, dy = torch.randn(5, 7, 24, requires_grad=True), torch.randn(5, 7, 40)
    y = layer(x)
    y.backward(dy)
    m, A, B = (
        t.detach().double().requires_grad_() for t in (adapter.magnitude.m, adapter.A, adapter.B)
    )
    x2 = x.detach().double().requires_grad_()
    whole = linear.weight.detach().double() + (B * adapter.g.double().unsqueeze(1)).T @ A
    scaled = (m / whole.detach().norm(dim=1)).unsqueeze(1) * whole
    y2 = nn.functional.linear(x2, scaled, linear.bias.detach().double() if bias else None)
    y2.backward(dy.double())
    for found, expected in (
        (y, y2), (x.grad, x2.grad), (adapter.magnitude.m.grad, m.grad),
        (adapter.A.grad, A.grad), (adapter.B.grad, B.grad),
    ):  # fmt: skip
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def by_peft(config: Config) -> tuple[list[float], nn.Module]:
    """PEFT's DoRA from the same A, in a plain loop."""
    made = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, use_dora=True)
    plain = AutoModelForCausalLM.from_pretrained(config.model.id, dtype=torch.float32)
    wrapped = peft.get_peft_model(plain, made)
    for name, adapter in open_session(config, World()).method.adapters.items():
        layer: Any = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.A.detach())
    return trained_by_torch(config, wrapped), wrapped


def test_a_run_its_folder_and_its_merged_model_are_pefts(tmp_path):
    save_random_model(tmp_path / "model", "qwen2", AutoModelForCausalLM)  # with biases
    config = configuration(tmp_path)
    run(config, World())
    expected, wrapped = by_peft(config)
    assert losses(config.run_folder) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[-1]) > 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    export_run(config.run_folder, tmp_path / "again", World())
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        wanted = wrapped.eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        for folder in (config.run_folder / "adapter", tmp_path / "again"):
            loaded = peft.PeftModel.from_pretrained(plain, folder)
            torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
            plain = loaded.unload()
    with pytest.raises(UserError, match=r"--rank: given for a run of method.kind=dora"):
        export_run(config.run_folder, tmp_path / "other", World(), rank=2)


def test_stacked_experts_and_earlier_adapters_are_refused(tmp_path):
    save_mixture(tmp_path / "model", "mixtral")
    with pytest.raises(UserError, match=r"method.targets: .*experts.* accepted: linear layers"):
        run(configuration(tmp_path, "method.targets=all-linear"), World())
    with pytest.raises(UserError, match=r"model.adapter: given with method.kind=dora"):
        configuration(tmp_path, f"model.adapter={tmp_path}/earlier")
