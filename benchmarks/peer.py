"""PEFT with bitsandbytes on the same shapes, the usual alternative on one GPU.

4-bit linear layers (or unquantised ones), LoRA on the same projections through `target_modules`,
stacked experts through `target_parameters` (which bitsandbytes leaves unquantised), bfloat16
autocast, gradient checkpointing of every layer (unless `engine.activation_checkpointing` is false),
torch's fused AdamW.
"""

from collections.abc import Callable, Sequence

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from adapters.unit import stem
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.model.backbone import set_module
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.model.meta import on_meta
from trainer.tasks.registry import TASKS


def peft_step(config: Config, world: World) -> tuple[Callable[[], None], int]:
    """(a training step of PEFT's model of the same shapes and batch, its number of trained
    parameters). Raises UserError."""
    job = PeftJob(config, world)
    size = config.data.micro_batch_size, config.data.max_length
    vocabulary = min(job.model.config.vocab_size, 32000)
    ids = torch.randint(3, vocabulary, size, device=world.device)

    def step() -> None:
        job.step([{"input_ids": ids, "labels": ids}])

    return step, sum(parameter.numel() for parameter in job.trained)


class PeftJob:
    """PEFT's model of the shapes of `config`, and its optimizer. Raises UserError."""

    def __init__(self, config: Config, world: World):
        self.config, self.device = config, world.device
        self.model = _adapted(config, world)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self.trained, lr=config.optim.learning_rate, fused=self.device.type == "cuda"
        )

    def step(self, micro_batches: Sequence[dict[str, torch.Tensor]]) -> float:
        """An optimizer step on the inputs of several forward passes; returns their mean loss."""
        losses = []
        for inputs in micro_batches:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(**inputs, use_cache=False).loss / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.max_grad_norm or 1e9)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(torch.stack(losses).sum())


def _adapted(config: Config, world: World) -> nn.Module:
    """The model with LoRA on the same projections. Raises UserError."""
    if world.size > 1 or config.model.quantization not in ("none", "nf4", "fp4"):
        raise UserError(
            f"--peer: peft given with {world.size} ranks and model.quantization="
            f"{config.model.quantization}; accepted: one rank, none, nf4 or fp4"
        )
    device = world.device
    task = TASKS[config.task.kind](config.task, load_tokenizer(config.model))
    backbone = build(config, task, device)
    units, shapes = backbone.units, backbone.model.config
    model = _random_model(shapes, config.model.quantization, device)
    stacks = {stem(unit.name) for unit in units if stem(unit.name) != unit.name}
    lora = LoraConfig(
        r=config.method.rank,
        lora_alpha=config.method.rank,
        target_modules=sorted({u.name for u in units if stem(u.name) not in stacks}),
        target_parameters=sorted(stacks) or None,
        task_type="CAUSAL_LM",
    )
    if config.engine.activation_checkpointing is not False:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapted = get_peft_model(model, lora)
    adapted.train()
    return adapted


def _random_model(shapes, quantization: str, device: torch.device) -> PreTrainedModel:
    """A random model built layer by layer on the device, in bfloat16 or 4 bits."""
    with on_meta(0) as moved:
        model = AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16)
        moved(model)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head and quantization != "none":
            weight = _random(module.weight.shape, device)
            small = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, device="meta",
                compute_dtype=torch.bfloat16, quant_type=quantization,
            )  # fmt: skip
            small.weight = bnb.nn.Params4bit(
                weight.cpu() if device.type == "cpu" else weight, requires_grad=False,
                quant_type=quantization, module=small,
            ).to(device)  # fmt: skip
            set_module(model, path, small)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = (
                    torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                    if parameter.dim() == 1
                    else _random(parameter.shape, device)
                )
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.tie_weights()
    return model


def _random(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
