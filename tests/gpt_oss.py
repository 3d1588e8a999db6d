"""Tiny gpt-oss models on disk, plain and with experts in MXFP4."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.helpers import save_random_model


def save_gpt_oss(folder: Path) -> Path:
    return save_random_model(
        folder, "gpt_oss", AutoModelForCausalLM, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
    )  # fmt: skip


def save_mxfp4(folder: Path, out: Path) -> Path:
    """Write the model of `folder` to `out` with random FP4 values in place of its stacks, as OpenAI
    publishes them, and to `folder` with the values that transformers takes them for."""
    generator = torch.Generator().manual_seed(1)
    stored, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(
            0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(
            120, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator
        )  # fmt: skip
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    for path, tensors in ((out, stored), (folder, plain)):
        path.mkdir(exist_ok=True)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (out / "config.json").write_text(json.dumps(config))
    return out
