"""Full fine-tuning on FSDP2: parameters, gradients and moments are sharded in float32.

A block is gathered, and computes, in `model.dtype`; its gradients are summed in float32. The update
is torch's AdamW on the sharded tensors.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.config.config import Config
from trainer.config.dtype import compute_dtype
from trainer.config.sections import OptimOptions
from trainer.distributed.world import World
from trainer.engine.fsdp2 import FSDP2Engine
from trainer.engine.sharded_optimizer import Gathered, ShardedOptimizer, trained_parameters


class FSDP2Full(FSDP2Engine):
    """Parameters train where FSDP2 holds them."""

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        dtype = compute_dtype(config.model, world.device)
        self.policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
        )

    @property
    def supports_unsharded_blocks(self) -> bool:
        """No: a block kept whole would not see the update of its shards."""
        return False

    def sharded_optimizer(self, model: nn.Module) -> ShardedOptimizer:
        return _AdamW(trained_parameters(model), self.config.optim, self.world.device)

    def backward(self, loss: Tensor) -> None:
        """FSDP2 takes the mean over ranks, of which each has a part of the loss."""
        (loss * self.world.size).backward()

    def local_bytes(self, model: nn.Module) -> int:
        return sum(cast(DTensor, p).to_local().nbytes for p in model.parameters())


class _AdamW(ShardedOptimizer):
    def __init__(
        self, parameters: dict[str, nn.Parameter], options: OptimOptions, device: torch.device
    ):
        super().__init__(parameters, {name: p.shape for name, p in parameters.items()})
        self._adamw = torch.optim.AdamW(
            parameters.values(),
            lr=options.learning_rate,
            betas=(options.betas[0], options.betas[1]),
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=device.type == "cuda",
        )

    def update(self, loss: float, max_norm: float | None) -> tuple[float, bool]:
        parameters = list(self.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # it took no part; it decays as on every engine
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if not skipped:
            if max_norm is not None and norm > max_norm:
                torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
            self._adamw.param_groups[0]["lr"] = self.learning_rate
            self._adamw.step()
            self.steps += 1
        self.zero_grad()
        return norm, skipped

    def zero_grad(self) -> None:
        self._adamw.zero_grad()

    def gathered(self, name: str) -> Gathered:
        parameter = cast(DTensor, self.parameters[name].detach())
        state = self._adamw.state.get(self.parameters[name], {})
        moments = [
            state[key].full_tensor() if key in state else torch.zeros(self.shapes[name])
            for key in ("exp_avg", "exp_avg_sq")
        ]
        return Gathered(parameter.full_tensor(), *moments)

    @torch.no_grad()
    def load(self, name: str, whole: Gathered, steps: int) -> None:
        parameter = cast(DTensor, self.parameters[name])

        def part(tensor: Tensor) -> DTensor:
            """This rank's part; every rank has the whole."""
            there = tensor.to(parameter.device)
            return distribute_tensor(
                there, parameter.device_mesh, parameter.placements, src_data_rank=None
            )

        parameter.to_local().copy_(part(whole.value).to_local())
        self._adamw.state[self.parameters[name]] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            "exp_avg": part(whole.exp_avg),
            "exp_avg_sq": part(whole.exp_avg_sq),
        }
        self.steps = steps
