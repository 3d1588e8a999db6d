"""From gated adapters to a plain LoRA that PEFT, vLLM and SGLang load, or into the weights.

The gates are folded into B, so that alpha/r = 1 in every unit: a loader that drops PEFT's
per-unit rank and alpha patterns (vLLM does) still gets the right product.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters.gated import GatedAdapter

_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


def lora_factors(adapter: GatedAdapter) -> tuple[Tensor, Tensor]:
    """(lora_A (r, in), lora_B (out, r)) in float32 with ΔW = lora_B lora_A; g is in lora_B."""
    A = adapter.A.detach().cpu()
    B = (adapter.B.detach() * adapter.g.detach().unsqueeze(1)).T.contiguous().cpu()
    return A, B


def export_adapter(
    folder: Path,
    adapters: Mapping[str, GatedAdapter],
    *,
    base_model: str,
    revision: str | None = None,
    task: str = "causal_lm",
    heads: Mapping[str, Tensor] | None = None,
    labels: int | None = None,
    note: str = "",
) -> None:
    """Write a PEFT folder: adapter_model.safetensors, adapter_config.json, README.md.

    `adapters` by module path; `heads`: parameters of whole trained modules by their full name;
    `labels`: outputs of a classification head.
    A unit of rank 0 is left out (PEFT refuses it).
    """
    heads = heads or {}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, adapter in adapters.items():
        A, B = lora_factors(adapter)
        if A.shape[0] == 0:
            continue
        ranks[name] = A.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    for name, value in heads.items():
        tensors[f"base_model.model.{name}"] = value.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(ranks, sorted({name.split(".")[0] for name in heads}))
    config |= {
        "base_model_name_or_path": base_model,
        "revision": revision,
        "task_type": _TASK_TYPES.get(task),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "README.md").write_text(_readme(base_model, task, labels, note), encoding="utf-8")


def _peft_config(ranks: Mapping[str, int], heads: list[str]) -> dict[str, object]:
    """LoraConfig as plain data. The commonest rank is `r`, others go to the patterns."""
    values = list(ranks.values())
    common = max(set(values), key=lambda rank: (values.count(rank), rank)) if values else 1
    others = {f"^{name}$".replace(".", r"\."): r for name, r in ranks.items() if r != common}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": heads or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def _readme(base_model: str, task: str, labels: int | None, note: str) -> str:
    auto = "SequenceClassification" if task == "sequence_classification" else "CausalLM"
    arguments = f'"{base_model}"' + (f", num_labels={labels}" if labels else "")
    return f"""---
base_model: {base_model}
library_name: peft
---

# LoRA adapter

```python
from peft import PeftModel
from transformers import AutoModelFor{auto}

model = AutoModelFor{auto}.from_pretrained({arguments})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

{note}
"""


@torch.no_grad()
def merged(weight: Tensor, adapter: GatedAdapter) -> Tensor:
    """W + ΔW, summed in float32, in W's dtype."""
    return (weight.float() + adapter.delta().to(weight.device)).to(weight.dtype)
