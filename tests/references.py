"""What transformers and PEFT compute for a record, and how near the project has to be."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import CAUSAL, PAIRS
from trainer.tasks.base import Example

LOSS = 1e-5
"""Largest |difference| of losses over max(1, loss), in float32."""
GRADIENT = 1e-3
"""Largest ‖difference‖ / ‖reference‖ of one matrix' gradient."""
SIGNS_ABOVE = 1e-4
"""Signs are compared where |gradient| is above this share of the matrix' largest."""
NOISE = 1e-6
"""Share of the largest norm of all gradients below which one is rounding."""


class Wrong(AssertionError):
    """The project's result is not the reference's."""


def reference_loss(part: str, model: nn.Module, examples: Sequence[Example]) -> float:
    """The mean loss of the records by transformers, as `summed_loss` takes them."""
    with torch.no_grad():
        return float(summed_loss(part, model, examples)) / sum(e.weight for e in examples)


def summed_loss(part: str, model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """The loss of one record after the other, without padding."""
    return torch.stack([_loss(part, model, example) for example in examples]).sum()


def _loss(part: str, model: nn.Module, example: Example) -> Tensor:
    """The summed cross entropy of transformers' logits of a record."""
    ids = torch.tensor([example.input_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if part == CAUSAL:  # some classes' own `loss` does not shift the labels
        learned = torch.tensor([example.loss_mask])[:, 1:].bool()
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits[learned], ids[:, 1:][learned], reduction="sum")
    if part == PAIRS:
        begin = list(example.loss_mask).index(1)
        source, labels = ids[:, :begin], ids[:, begin:]
        # Given labels, transformers makes the decoder's tokens of them.
        logits = model(
            input_ids=source, attention_mask=torch.ones_like(source), labels=labels
        ).logits
        return F.cross_entropy(logits[0], labels[0], reduction="sum")
    if example.token_type_ids:
        inputs["token_type_ids"] = torch.tensor([example.token_type_ids])
    label = torch.tensor([int(example.label)])
    return F.cross_entropy(model(**inputs).logits, label, reduction="sum")


def with_peft(model: PreTrainedModel, adapters: dict[str, Any]) -> peft.PeftModel:
    """PEFT's LoRA on the same layers, with the same A, B and scale."""
    first = next(iter(adapters.values()))
    scale = float(first.g[0]) * first.rank
    config = peft.LoraConfig(
        r=first.rank, lora_alpha=scale, target_modules=list(adapters), lora_dropout=0.0
    )
    # In a mixture PEFT would take dense layers' names, such as `gate_proj`, for experts'.
    with patch("peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"):
        wrapped = peft.get_peft_model(model, config).eval()
    for name, adapter in adapters.items():
        layer: Any = wrapped.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(adapter.A.detach())
        layer.lora_B["default"].weight.data.copy_(adapter.B.detach().T)
    return wrapped


def check_same(what: str, ours: float, reference: float) -> None:
    if not abs(ours - reference) <= LOSS * max(1.0, abs(reference)):
        raise Wrong(f"{what} {ours:.7f}, reference {reference:.7f}")


def check_gradients(found: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
    """(ours, the reference) by name. A gradient that is noise beside the largest is not compared:
    the loss does not depend on that matrix, as on a router that chooses one expert of one."""
    noise = NOISE * max(float(g.norm()) for pair in found.values() for g in pair if g is not None)
    for name, (ours, reference) in found.items():
        if all(g is None or float(g.norm()) <= noise for g in (ours, reference)):
            continue
        if ours is None or reference is None:
            raise Wrong(f"{name}: no gradient" + (" in PEFT" if reference is None else ""))
        large = reference.abs() > SIGNS_ABOVE * reference.abs().max()
        agree = (ours.sign() == reference.sign())[large]
        error = float((ours - reference).norm() / reference.norm())
        if not bool(agree.all()) or not error <= GRADIENT:
            share = float(agree.float().mean())
            raise Wrong(f"gradient of {name}: {share:.1%} of the signs, relative error {error:.1e}")
