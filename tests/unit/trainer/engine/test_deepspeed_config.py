"""A user's DeepSpeed JSON: `auto` filled in, contradictions and foreign claims refused by name."""

import json

import pytest
import torch
from torch import nn

from tests.helpers import ROOT, quick_config
from trainer.distributed.world import World
from trainer.engine.deepspeed_config import merge, read_user_json, settings, sizes
from trainer.engine.deepspeed_full import DeepSpeedFull
from trainer.errors import UserError


def resolved(tmp_path, user, dtype=torch.float32, ranks=2):
    (tmp_path / "ds.json").write_text(json.dumps(user))
    config = quick_config(
        tmp_path, "engine.kind=deepspeed", f"engine.config={tmp_path}/ds.json", "data.batch_size=8"
    )
    return merge(read_user_json(config), settings(config, ranks, dtype))


def test_shipped_file_has_its_autos_filled_in(tmp_path):
    user = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    found = resolved(tmp_path, user, torch.bfloat16)
    assert found["train_batch_size"] == 8
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 1.0
    assert found["bf16"] == {"enabled": True}
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["overlap_comm"] is True
    block = nn.ModuleDict({"projection": nn.Linear(4, 6, bias=False), "norm": nn.LayerNorm(4)})
    sized = merge(found, {"zero_optimization": sizes(block)})
    assert sized["zero_optimization"]["stage3_prefetch_bucket_size"] == 32
    assert sized["zero_optimization"]["stage3_param_persistence_threshold"] == 4
    assert "auto" not in json.dumps(sized)


def test_what_the_user_sets_stays(tmp_path):
    user = {
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 5,
            "offload_param": {"device": "auto"},
        },
    }
    found = merge(resolved(tmp_path, user), {"zero_optimization": sizes(nn.Linear(2, 2))})
    assert found["wall_clock_breakdown"] is True
    assert found["zero_optimization"]["stage3_max_live_parameters"] == 5
    assert found["zero_optimization"]["offload_param"] == {}


REFUSED = {
    "train_batch_size": (16, "train_batch_size: 16.*data.batch_size.*accepted: 8"),
    "train_micro_batch_size_per_gpu": (1, "train_micro.*1 given.*data.micro_batch_size"),
    "gradient_clipping": (0.5, "gradient_clipping: 0.5.*optim.max_grad_norm"),
    "bf16": ({"enabled": True}, "bf16.enabled: True.*model.dtype.*False"),
    "fp16": ({"enabled": True}, "fp16 given.*model.dtype"),
    "optimizer": ({"type": "Adam"}, "optimizer given.*optim"),
    "scheduler": ({"type": "WarmupLR"}, "scheduler given.*optim.schedule"),
    "zero_optimization": ({"stage": 2}, "zero_optimization.stage: 2.*accepted: 3"),
}


@pytest.mark.parametrize("key", list(REFUSED))
def test_contradictions_are_named(tmp_path, key):
    value, message = REFUSED[key]
    with pytest.raises(UserError, match=message):
        resolved(tmp_path, {key: value})


def test_requantising_the_packed_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="zero_quantized_weights"):
        resolved(tmp_path, {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}})


def test_full_fine_tuning_refuses_offloaded_moments(tmp_path, monkeypatch):
    """They would be updated without a gradient."""
    monkeypatch.setattr("trainer.engine.deepspeed._import_deepspeed", lambda _: None)
    for device in ("none", "cpu", "nvme"):
        user = {"zero_optimization": {"offload_optimizer": {"device": device}}}
        (tmp_path / "ds.json").write_text(json.dumps(user))
        config = quick_config(
            tmp_path, "engine.kind=deepspeed", "method.kind=full",
            f"engine.config={tmp_path}/ds.json",
        )  # fmt: skip
        if device == "none":
            DeepSpeedFull(config, World())
            continue
        with pytest.raises(
            UserError, match=r"zero_optimization\.offload_optimizer: .* leave it out"
        ):
            DeepSpeedFull(config, World())
