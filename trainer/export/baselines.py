"""Export of the baselines: PEFT's own folder of its adapter, or the whole trained model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapters.methods.peft import configuration, kind_of, save
from trainer.config.config import Config
from trainer.errors import UserError
from trainer.export.card import Training, write_adapter_card
from trainer.model.backbone import BuiltModel
from trainer.model.peft_names import modules_to_save

if TYPE_CHECKING:
    from peft import PeftModel

Heads = Mapping[str, Mapping[str, Tensor]]
"""Parameters by name of the modules trained in full, by module path."""
TRAINED = "trained/"
FIXED = "method/"


def write_peft(
    folder: Path,
    wrapper: "PeftModel",
    tensors: Mapping[str, Tensor],
    heads: Heads,
    training: Training,
) -> None:
    """PEFT's folder of what PEFT added to the backbone (`tensors`, by its names), with a card."""
    config = training.config
    model: Any = wrapper.base_model.model
    described = {
        "base_model_name_or_path": config.model.id,
        "revision": config.model.revision,
        "task_type": training.task.peft_task_type,
        "modules_to_save": modules_to_save(model, heads) or None,
    }
    save(wrapper, folder, tensors, heads, described)
    write_adapter_card(folder, training, kind=kind_of(wrapper.peft_config["default"]))


def write_peft_checkpoint(
    folder: Path, built: BuiltModel, stored: Mapping[str, Tensor], heads: Heads, training: Training
) -> None:
    """`write_peft` from a checkpoint's tensors, on the model without its weights."""
    from peft import get_peft_model

    with torch.random.fork_rng([]):
        targets = [unit.name for unit in built.units]
        method = configuration(training.config.method, targets)  # type: ignore[arg-type]
        wrapper = get_peft_model(built.model, method)
    tensors = {
        name.removeprefix(TRAINED).removeprefix(FIXED): tensor
        for name, tensor in stored.items()
        if name.startswith((TRAINED, FIXED))
    }
    write_peft(folder, wrapper, tensors, heads, training)


def refuse_layout(
    config: Config, *, rank: int | None, same_rank: bool, experts: str | None
) -> None:
    """Raises UserError for options of an export that only the adapters here have."""
    for key, given in (
        ("--rank", rank),
        ("--same-rank", same_rank or None),
        ("--experts", experts),
    ):
        if given is not None:
            raise UserError(
                f"{key}: given for a run of method.kind={config.method.kind}; accepted: without it"
            )
