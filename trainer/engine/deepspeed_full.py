"""Full fine-tuning on DeepSpeed ZeRO-3: parameters, gradients and moments are partitioned.

DeepSpeed reduces, clips and updates; the moments are those of torch's AdamW, which it calls on the
flat partitions. Parameters are held in `model.dtype`, and once more in float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.config import Config
from trainer.config.dtype import compute_dtype
from trainer.config.sections import OptimOptions
from trainer.distributed.world import World
from trainer.engine.deepspeed import DeepSpeedEngine
from trainer.engine.deepspeed_config import merge
from trainer.engine.sharded_optimizer import Gathered, ShardedOptimizer, trained_parameters
from trainer.errors import UserError


class DeepSpeedFull(DeepSpeedEngine):
    """Parameters train where ZeRO-3 holds them."""

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        self._dtype = compute_dtype(config.model, world.device)
        offload = self._json["zero_optimization"].get("offload_optimizer") or {}
        if offload.get("device", "none") != "none":
            # DeepSpeed copies gradients there in the backward pass of the last micro-batch only,
            # and `backward` marks none as that.
            raise UserError(
                f"engine.config: {config.engine.config}: zero_optimization.offload_optimizer: "
                f"{offload!r} given with method.kind={config.method.kind}; accepted: leave it out"
            )

    def shard_block(self, block: nn.Module) -> None:
        super().shard_block(block.to(self._dtype))

    def _sized(self) -> dict[str, Any]:
        bucket = self._sizes.get("stage3_prefetch_bucket_size", 0)  # a block; else 2 GB
        ours = {
            "zero_optimization": {"reduce_bucket_size": max(bucket, 1)},
            # Else in `model.dtype`, in which small gradients are lost in the sum.
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
        return merge(super()._sized(), ours)

    def _initialise(self, model: nn.Module) -> Any:
        import deepspeed

        optim: OptimOptions = self.config.optim
        self._adamw = torch.optim.AdamW(
            trained_parameters(model.to(self._dtype)).values(),
            lr=optim.learning_rate,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=self._adamw, config=self._sized())
        return engine

    def sharded_optimizer(self, model: nn.Module) -> ShardedOptimizer:
        return _ZeroAdamW(self._engine, self._adamw, trained_parameters(model), self.world)

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed takes the mean over ranks, of which each has a part of the loss."""
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)
        # The engine's own forward, which the loop does not call, begins with this: without it the
        # next micro-batch's gradients would take the place of these.
        self._engine.optimizer.clear_backward_seen_flag()


class _ZeroAdamW(ShardedOptimizer):
    def __init__(
        self, engine: Any, adamw: torch.optim.AdamW, parameters: dict[str, Any], world: World
    ):
        super().__init__(parameters, {name: p.ds_shape for name, p in parameters.items()})
        self._engine, self._adamw, self._world = engine, adamw, world

    def update(self, loss: float, max_norm: float | None) -> tuple[float, bool]:
        if not math.isfinite(loss):
            self.zero_grad()
            return math.nan, True
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()  # clips to `gradient_clipping`, which is `max_norm`
        if self._engine.optimizer.overflow:
            return math.nan, True
        self.steps += 1
        return float(self._engine.get_global_grad_norm()), False

    def zero_grad(self) -> None:
        self._engine.optimizer.zero_grad()

    def gathered(self, name: str) -> Gathered:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        value = safe_get_full_fp32_param(parameter)
        if self._adamw.state:
            moments = [
                safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")
            ]
        else:
            moments = [torch.zeros(self.shapes[name]) for _ in range(2)]
        return Gathered(value, *moments)

    @torch.no_grad()
    def load(self, name: str, whole: Gathered, steps: int) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        self._begin(steps)
        parameter: Any = self.parameters[name]

        def part(tensor: Tensor) -> Tensor:
            """This rank's part of the flat tensor, padded to equal ones."""
            size = parameter.ds_tensor.numel()
            flat = F.pad(tensor.flatten(), (0, size * self._world.size - tensor.numel()))
            return flat.narrow(0, self._world.rank * size, size).to(parameter.device)

        safe_set_local_fp32_param(parameter, part(whole.value))
        safe_set_local_optimizer_state(parameter, part(whole.exp_avg), "exp_avg")
        safe_set_local_optimizer_state(parameter, part(whole.exp_avg_sq), "exp_avg_sq")
        parameter.ds_tensor.copy_(part(whole.value))
        if parameter.numel() == whole.value.numel():  # one that stays whole
            parameter.copy_(whole.value)

    def _begin(self, steps: int) -> None:
        """Make the moments, as the first step would, at a count of `steps`."""
        self.steps = steps
        for flat in self._engine.optimizer.fp32_partitioned_groups_flat:
            state = self._adamw.state[flat]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(flat),
                    torch.zeros_like(flat),
                )
            state["step"] = torch.tensor(float(steps))
