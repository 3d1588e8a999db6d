"""Benchmark scripts run at tiny shapes; what they time here means nothing."""

import json
import subprocess
import sys

import pytest

from tests.helpers import ROOT

TINY = [
    "model.overrides.hidden_size=64", "model.overrides.intermediate_size=96",
    "model.overrides.num_attention_heads=4", "model.overrides.num_key_value_heads=2",
    "model.overrides.head_dim=16", "data.max_length=128",
]  # fmt: skip


@pytest.mark.parametrize("config", ["llama70b_random", "mixtral_random"])
def test_throughput_measures_both_on_the_same_shapes(tmp_path, config):
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks.throughput", f"configs/{config}.yaml", "--layers",
            "1", "--steps", "2", "--peer", "peft", "--out", str(tmp_path / "out.json"),
            f"data.cache={tmp_path}/cache", *TINY,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    ours, theirs = figures
    assert (ours["who"], theirs["who"]) == ("rankcast", "peft")
    assert ours["trainable"] == theirs["trainable"] > 0
    assert ours["tokens_per_second"] == pytest.approx(128 / ours["step_seconds"])
    # Both are held against the same work.
    assert ours["tflops"] * ours["step_seconds"] == pytest.approx(
        theirs["tflops"] * theirs["step_seconds"]
    )
