"""Count what is compiled while a run goes on: programs by torch.compile, kernels by Triton.

A step whose shapes or tensors differ from all before it may compile for seconds. Programs that a
cache holds count too: loading one also takes a while.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch._dynamo.callback import callback_handler


class Compilations:
    """Counts compilations in all threads of this process while its context is entered."""

    def __init__(self) -> None:
        self.programs = 0
        """By torch.compile: forward and backward passes of a function."""
        self.kernels = 0
        """Written in Triton, compiled outside of a program."""
        self._former: Callable[..., Any] | None = None

    def __enter__(self) -> "Compilations":
        callback_handler.register_start_callback(self._begin_program)
        if (runtime := _triton_runtime()) is not None:
            self._former = runtime.jit_post_compile_hook
            runtime.jit_post_compile_hook = self._compiled_kernel
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        # torch._dynamo.reset() has removed it already.
        if self._begin_program in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(self._begin_program)
        if (runtime := _triton_runtime()) is not None:
            runtime.jit_post_compile_hook = self._former

    @property
    def total(self) -> int:
        return self.programs + self.kernels

    def _begin_program(self, _: Any) -> None:
        self.programs += 1

    def _compiled_kernel(self, **about: Any) -> Any:
        self.kernels += 1
        return None if self._former is None else self._former(**about)


def _triton_runtime() -> Any:
    """Triton's hooks; None without Triton, as on most CPUs."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime
