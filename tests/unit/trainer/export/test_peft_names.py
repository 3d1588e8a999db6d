"""PEFT finds every exported adapter, whatever transformers' table of conversions makes of its name."""

import peft
import pytest
import torch
from transformers import CONFIG_MAPPING

from adapters.factors import lora_factors
from adapters.gated import GatedAdapter
from adapters.peft_export import export_adapter
from adapters.units import is_linear
from tests.tiny_models import CLASSIFICATION, tiny_model
from trainer.errors import UserError
from trainer.model.peft_names import PeftKeys, former_experts, lost_by_peft, modules_to_save


def adapters_of(model, excluded=()):
    generator = torch.Generator().manual_seed(0)
    sizes = {
        path: (module.in_features, module.out_features)
        for path, module in model.named_modules()
        if is_linear(module) and path not in excluded
    }
    return {
        path: GatedAdapter(
            torch.randn(2, columns, generator=generator), torch.ones(2),
            torch.randn(2, rows, generator=generator),
        )
        for path, (columns, rows) in sizes.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "laguna",  # renames `shared_expert.`, a pattern that fits `shared_experts` too
        "longcat_flash",  # experts of another form, dense layers called as former experts
        "qwen2_moe",
        "llama",
    ],
)
def test_every_linear_layer_gets_its_adapter(name, tmp_path):
    model = tiny_model(name)
    adapters = adapters_of(model, ["lm_head"])
    export_adapter(
        tmp_path / "a", adapters, base_model="", task_type="CAUSAL_LM",
        model_class="AutoModelForCausalLM", former_experts=former_experts(model),
        key=PeftKeys(model),
    )  # fmt: skip
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "a").base_model.model
    for path, adapter in adapters.items():
        A, B = lora_factors(adapter)
        layer = loaded.get_submodule(path)
        assert torch.equal(layer.lora_A["default"].weight, A), path
        assert torch.equal(layer.lora_B["default"].weight, B), path
        assert layer.scaling["default"] == 1


@pytest.mark.skipif("inkling2_text" not in CONFIG_MAPPING, reason="newer than this transformers")
def test_a_layer_that_no_name_reaches():
    model = tiny_model("inkling2_text")
    lost = lost_by_peft(model, adapters_of(model))
    assert {path.rpartition(".")[2] for path in lost} == {"weight_proj"}
    path = next(iter(lost))
    with pytest.raises(
        UserError, match=rf"method\.targets: {path}: PEFT would load its adapter as"
    ):
        PeftKeys(model)(path)


def test_a_head_whose_path_ends_another_modules(tmp_path):
    """ModernVBERT: `head` is trained, `vision_model.head` is not."""
    model = tiny_model("modernvbert", CLASSIFICATION)
    paths = ["classifier", "head"]
    heads = {
        path: {
            name: torch.full_like(p, 0.5)
            for name, p in model.get_submodule(path).named_parameters()
        }
        for path in paths
    }
    before = model.model.vision_model.head.probe.clone()
    saved = modules_to_save(model, paths)
    adapters = adapters_of(model)
    path = next(path for path in adapters if "text_model" in path)
    export_adapter(
        tmp_path / "a", {path: adapters[path]}, base_model="", task_type="SEQ_CLS",
        model_class="AutoModelForSequenceClassification", heads=heads, modules_to_save=saved,
    )  # fmt: skip
    assert saved == ["base_model.model.head", "classifier"]
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "a").base_model.model
    for path, values in heads.items():
        for name, value in values.items():
            wrapper = loaded.get_submodule(path).modules_to_save["default"]
            assert torch.equal(wrapper.get_parameter(name), value)
    assert torch.equal(loaded.model.vision_model.head.probe, before)
