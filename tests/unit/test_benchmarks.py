"""Benchmark scripts run at tiny shapes; what they time here means nothing."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers import python, quick_config, thorough
from trainer.distributed.world import World
from trainer.run.run import run

TINY = [
    "model.overrides.hidden_size=64", "model.overrides.intermediate_size=96",
    "model.overrides.num_attention_heads=4", "model.overrides.num_key_value_heads=2",
    "model.overrides.head_dim=16", "data.max_length=128",
]  # fmt: skip


@pytest.mark.parametrize(
    "config", ["llama70b_random", pytest.param("mixtral_random", marks=thorough)]
)
def test_throughput_measures_both_on_the_same_shapes(tmp_path, config):
    code, _, err = python(
        "-m", "benchmarks.throughput", f"configs/{config}.yaml", "--layers", "1", "--steps", "2",
        "--peer", "peft", "--out", str(tmp_path / "out.json"), f"data.cache={tmp_path}/cache", *TINY,
    )  # fmt: skip
    assert code == 0, err[-2000:]
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    ours, theirs = figures
    assert (ours["who"], theirs["who"]) == ("rankcast", "peft")
    assert ours["trainable"] == theirs["trainable"] > 0
    assert ours["tokens_per_second"] == pytest.approx(128 / ours["step_seconds"])
    # Both are held against the same work.
    assert ours["tflops"] * ours["step_seconds"] == pytest.approx(
        theirs["tflops"] * theirs["step_seconds"]
    )


@thorough
def test_generation_gives_what_transformers_gives_on_the_same_prompts(tmp_path):
    run(quick_config(tmp_path, "data.eval=null", "run.name=short"), World())
    code, _, err = python(
        "-m", "benchmarks.generation", str(tmp_path / "runs/short"), "--prompts", "6", "--length",
        "16", "--peer", "merged,peft", "--out", str(tmp_path / "out.json"),
        "generation.max_new_tokens=8", "generation.batch_size=4",
    )  # fmt: skip
    assert code == 0, err[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == ["rankcast", "merged", "peft"]
    for figures in found.values():
        assert (figures["tokens"], figures["same_answers"]) == (48, "6 of 6")
        assert figures["tokens_per_second"] > 0


@thorough
def test_generation_is_timed_on_random_weights_too(tmp_path):
    code, _, err = python(
        "-m", "benchmarks.generation", "configs/llama70b_random.yaml", "--prompts", "3", "--length",
        "12", "--peer", "merged,peft", "--out", str(tmp_path / "out.json"),
        "generation.max_new_tokens=4", "model.overrides.num_hidden_layers=1", *TINY,
        "model.overrides.intermediate_size=128",  # bitsandbytes on a CPU takes whole blocks of 64
    )  # fmt: skip
    assert code == 0, err[-2000:]
    found = json.loads((tmp_path / "out.json").read_text())
    assert [figures["tokens"] for figures in found.values()] == [12, 12, 12]


@thorough
@pytest.mark.parametrize(
    ("config", "processes", "changes"),
    [
        ("llama70b_random", 1, ["model.quantization=int8"]),
        ("mixtral_random", 2, ["method.kind=lelora", "method.rank=4", "method.alpha=8"]),
    ],
)
def test_loading_writes_a_checkpoint_and_reads_it_once(tmp_path, config, processes, changes):
    script = tmp_path / "loading.py"
    script.write_text("from benchmarks.loading import main\n\nmain()\n")
    folder, out = tmp_path / "checkpoint", tmp_path / "out.json"
    code, printed, err = python(
        script, f"configs/{config}.yaml", str(folder), "--layers", "2", "--out", str(out),
        "engine.device=cpu", *TINY, *changes, processes=processes,
    )  # fmt: skip
    assert code == 0, err[-2000:]
    data = json.loads(out.read_text())
    assert data["layers"] == 2 and "| load, cold |" in printed
    passes = {figure["what"]: figure for figure in data["figures"]}
    assert list(passes) == [
        "files alone, cold",
        "load, cold",
        "files alone, cached",
        "load, cached",
    ]
    for state in ("cold", "cached"):
        loaded = passes[f"load, {state}"]
        assert loaded["share_read"] == 1.0 and loaded["bytes_read"] == data["bytes"]
        assert len(loaded["host_gib"]) == processes
        assert ("decomposing" in loaded["stages"]) == (processes == 2)
    # As published: transformers finds every tensor under the name that it expects.
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    if "mixtral" in config:
        names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in names


@thorough
@pytest.mark.parametrize("units", ["1", "0"])
def test_spectral_counts_every_unit(tmp_path, units):
    out = tmp_path / "out.json"
    code, _, err = python(
        "-m", "benchmarks.spectral", "configs/llama70b_random.yaml", "--units", units, "--out",
        str(out), "engine.device=cpu", "method.rank=4", "model.overrides.num_hidden_layers=3", *TINY,
    )  # fmt: skip
    assert code == 0, err[-2000:]
    data = json.loads(out.read_text())
    assert data["units"] == sum(shape["units"] for shape in data["shapes"]) == 21
    assert data["how"] == ("computed" if units == "0" else "extrapolated")
    expected = sum(shape["units"] * shape["seconds"] for shape in data["shapes"])
    assert units == "0" or data["seconds"] == pytest.approx(expected)
    for shape in data["shapes"]:
        assert 0 < shape["gram"] + shape["eigh"] + shape["qr"] <= shape["seconds"]


@thorough
def test_decisions_are_timed_in_real_runs(tmp_path):
    script, out = tmp_path / "decisions.py", tmp_path / "out.json"
    script.write_text("from benchmarks.decisions import main\n\nmain()\n")
    code, printed, err = python(
        script, "configs/mixtral_random.yaml", "--steps", "2", "--methods",
        "lalora,weightlora", "--out", str(out), "model.overrides.num_hidden_layers=1",
        f"data.cache={tmp_path}/cache", processes=2,
    )  # fmt: skip
    assert code == 0, err[-2000:]
    found = json.loads(out.read_text())
    assert [result["method"] for result in found] == ["lalora", "weightlora"]
    for result in found:
        assert result["units"] == 20 and 0 < result["ms"] <= result["slowest"]
        assert f"| {result['method']} | 20 |" in printed
