"""Compilations are counted, forward and backward, and only while asked."""

import torch

from trainer.model.compilations import Compilations


def test_each_program_counts_once():
    def square(x):
        return x * x

    compiled = torch.compile(square, dynamic=True, backend="aot_eager")
    with Compilations() as counted:
        for length in (3, 4, 5):
            compiled(torch.ones(length, requires_grad=True)).sum().backward()
        first = counted.programs
        assert first in (1, 2)  # backward with forward, or when it first runs
        compiled(torch.ones(6))  # without a gradient: another program
        assert counted.programs == first + 1
    torch.compile(square, backend="eager")(torch.ones(2))
    assert counted.total == counted.programs == first + 1
