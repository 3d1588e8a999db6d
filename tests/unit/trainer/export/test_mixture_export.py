"""Mixtures that also have dense MLPs or shared experts: what PEFT makes of an export; what a
mixture must be."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers import quick_config, save_mixture, save_random_model
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.export import export_run
from trainer.run.run import run
from trainer.session import open_session

MIXED = {
    "num_experts": 5, "moe_intermediate_size": 40,
    "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [0],
}  # fmt: skip
SHARED = {
    "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1,
}  # fmt: skip


@pytest.mark.parametrize("model_type, shape, changes", [
    ("qwen3_moe", MIXED, ["method.targets=all-linear", "method.rank=4"]),
    ("qwen3_moe", MIXED, ["method.targets=[gate_up_proj,down_proj]", "method.kind=lelora"]),
    ("qwen3_moe", MIXED, ["method.targets=all-linear", "method.kind=adalora", "method.tinit=1",
                          "method.tfinal=1", "method.delta_t=1"]),
    ("qwen3_moe", MIXED, [r"method.targets=.*layers\.0\.mlp\.(gate|up|down)_proj"]),
    ("glm4_moe", SHARED, ["method.targets=all-linear"]),
    ("qwen2_moe", {"shared_expert_intermediate_size": 96}, ["method.targets=all-linear"]),
])  # fmt: skip
def test_peft_takes_dense_modules_for_what_they_are(model_type, shape, changes, tmp_path):
    folder = save_mixture(tmp_path / "model", model_type, **shape)
    config = quick_config(
        tmp_path, f"model.id={folder}", "checkpoint.every=4", "optim.learning_rate=1e-2", *changes
    )
    run(config, World())
    export_run(config.run_folder, tmp_path / "out", World())
    export_run(config.run_folder, tmp_path / "merged", World(), what="merged")
    ids = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))

    def base():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected = merged(ids).logits
        assert (base()(ids).logits - expected).abs().max() > 1e-2
        for adapter in (tmp_path / "out", config.run_folder / "adapter"):
            loaded = PeftModel.from_pretrained(base(), adapter)
            torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_the_grouped_product_cannot_take_are_refused(tmp_path):
    folder = save_random_model(
        tmp_path / "model", "qwen3_moe", AutoModelForCausalLM, num_experts=3,
        num_experts_per_tok=3, moe_intermediate_size=30,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"experts of 60 x 64.*multiples of 8$"):
        open_session(quick_config(tmp_path, f"model.id={folder}", "model.dtype=bfloat16"), World())
    with pytest.raises(UserError, match=r"experts of 64 x 30.*multiples of 4$"):
        open_session(quick_config(tmp_path, f"model.id={folder}"), World())


@pytest.mark.parametrize("chosen", [0, 9])
def test_more_experts_for_a_token_than_there_are(chosen, tmp_path):
    folder = save_mixture(tmp_path / "model", "mixtral")
    config = quick_config(
        tmp_path, f"model.id={folder}", "model.weights=random",
        f"model.overrides.num_experts_per_tok={chosen}",
    )  # fmt: skip
    with pytest.raises(UserError, match=f"num_experts_per_tok: {chosen} given; .* the 4 of"):
        open_session(config, World())


@pytest.mark.parametrize("rank", [0, -1])
def test_an_export_of_no_rank_is_refused(rank, tmp_path):
    with pytest.raises(UserError, match=f"--rank: {rank} given; accepted: 1 or more"):
        export_run(tmp_path, tmp_path / "out", World(), rank=rank)
