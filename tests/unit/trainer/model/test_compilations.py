"""Compilations are counted, forward and backward, and only while asked."""

import torch

from tests.helpers import python, thorough
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


RUN = """
import sys
from pathlib import Path
from tests.helpers import quick_config
from torch._dynamo.utils import counters
from trainer.distributed.world import World
from trainer.model.compilations import Compilations
from trainer.records.metrics import MetricsWriter
from trainer.run.run import run

seen, write = [], MetricsWriter.write
folder, name = Path(sys.argv[1]), sys.argv[2]
with Compilations() as counted:
    MetricsWriter.write = lambda self, values: (seen.append(counted.total), write(self, values))[1]
    run(quick_config(
        folder, f"run.name={name}", "run.steps=40", "engine.compile=true", "log.every=1",
        f"engine.compile_cache={folder}/compiled", "data.eval=null", "data.max_length=64",
        "data.on_bad_record=skip", "model.dtype=float32",
    ), World())
hits, misses = (counters["inductor"][f"fxgraph_cache_{kind}"] for kind in ("hit", "miss"))
print("\\n", seen[0], seen[1], seen[-1], hits + counters["aot_autograd"]["autograd_cache_hit"], misses)
"""


@thorough
def test_a_run_compiles_once_and_the_next_start_takes_it_from_the_cache(tmp_path):
    """With the compiler's own backend, on records of all lengths."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    found = []
    for name in ("first", "second"):
        code, printed, err = python(script, tmp_path, name)
        assert code == 0, err[-2000:]
        found.append([int(number) for number in printed.split("\n")[-2].split()])
    (_, early, late, _, misses), (_, *again, hits, none) = found
    assert early == late > 0 and again[0] == again[1]
    assert misses > 0 and hits > 0 and none == 0
    assert any((tmp_path / "compiled").iterdir())
