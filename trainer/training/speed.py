"""Speed of training, as it is logged: of all ranks, of a GPU, and as a share of its peak."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trainer.model.flops import ModelFlops, model_flops
from trainer.model.peak_flops import peak_flops
from trainer.session import Session
from trainer.training.step import StepDone


@dataclass(frozen=True)
class Peak:
    """What model FLOPs utilisation (MFU) is measured by."""

    model: ModelFlops
    flops: float
    """FLOP/s of a GPU, dense in bfloat16."""


def known_peak(session: Session) -> Peak | None:
    """None on a CPU and on GPUs whose peak is not known, for models that the formula does not
    describe, and in float32, which has another peak."""
    device = session.world.device
    if device.type != "cuda" or session.backbone.dtype.itemsize != torch.bfloat16.itemsize:
        return None
    flops = peak_flops(torch.cuda.get_device_name(device))
    if flops is None:
        return None
    trains = session.config.method.kind == "full"  # biases and norms alone have no matrices
    model = model_flops(session.backbone.model, trains=trains)
    return None if model is None else Peak(model, flops)


class Clock:
    """Time, tokens, FLOPs and steps since the last logged step."""

    def __init__(self, peak: Peak | None = None) -> None:
        self._peak = peak
        self._started, self._tokens, self._flops, self._steps = time.perf_counter(), 0, 0.0, 0

    def count(self, done: StepDone) -> None:
        """Count a finished step."""
        self._tokens += done.tokens
        self._steps += 1
        if self._peak is not None:
            self._flops += self._peak.model.of_step(done.lengths, done.weight)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not counted."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def figures(self, gpus: int) -> dict[str, Any]:
        """For the log; `gpus`: ranks that each have one, 0 on CPUs."""
        seconds = time.perf_counter() - self._started
        speed = self._tokens / seconds
        found: dict[str, Any] = {"tokens_per_second": round(speed, 1)}
        if gpus:
            found["tokens_per_second_per_gpu"] = round(speed / gpus, 1)
        if gpus and self._peak is not None:
            found["mfu"] = round(self._flops / seconds / gpus / self._peak.flops, 4)
        return {**found, "step_seconds": round(seconds / self._steps, 4)}
