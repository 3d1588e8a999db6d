"""Benchmark scripts run at tiny shapes; what they time here means nothing."""

import json

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.mixed_records import mixed
from benchmarks.parts import table
from benchmarks.real_part import measure
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
def test_throughput_on_real_records(tmp_path):
    """This project and PEFT take the same records; a part that fails leaves the others alone."""
    out = tmp_path / "out.json"
    code, printed, err = python(
        "-m", "benchmarks.throughput", "configs/llama8b_random.yaml", "--data",
        "configs/quickstart/train.jsonl", "--steps", "3", "--steps-of", "peft-padded=2",
        "--warm-up", "1", "--records", "4x2", "--profile", str(tmp_path / "profiles"), "--out",
        str(out), "--parts", "single,unpacked,peft-packed,peft-padded", "engine.device=cpu",
        f"data.cache={tmp_path}/cache", "model.overrides.num_hidden_layers=1",
        "data.batch_size=2", "run.verify=off", *TINY,
    )  # fmt: skip
    assert code == 0, err[-2000:]
    single, unpacked, packed, padded = json.loads(out.read_text())["parts"]
    assert single["fill"] == 1.0 and single["tokens_per_step"] == 2 * 128
    assert 0.2 < unpacked["fill"] < 1.0 and packed["tokens_per_step"] <= 2 * 128
    assert [len(part["seconds"]) for part in (single, unpacked, packed, padded)] == [4, 4, 4, 3]
    for part in (single, unpacked, packed, padded):
        timed = part["seconds"][1:]
        assert part["tokens_per_second"] * sum(timed) == pytest.approx(
            part["tokens_per_step"] * len(timed)
        )
        assert part["programs"] == 0 and part["first_step_seconds"] > timed[0]
        assert "Self CPU" in (tmp_path / f"profiles/{part['part']}.txt").read_text()
    assert "| peft-padded |" in printed
    code, printed, _ = python(
        "-m", "benchmarks.throughput", "configs/llama8b_random.yaml", "--data", "none.jsonl",
        "--parts", "unpacked", "engine.device=cpu", *TINY,
    )  # fmt: skip
    assert code == 1 and "| unpacked | failed: 2" in printed


@pytest.mark.parametrize(("limit", "timed"), [(None, 7), (10**6, 7), (0, 1)])
def test_a_slow_part_ends_with_the_steps_it_has(limit, timed):
    part = measure("unpacked", iter([(3, 4)] * 9), 2, 7, World(), limit)
    assert part.steps == timed and len(part.seconds) == 2 + timed
    assert (part.tokens_per_step, part.fill) == (3, 0.75)


def test_table_of_parts():
    figures = {
        "median_tokens_per_second": 1.0, "fill": 0.5, "tokens_per_step": 10.0, "step_seconds": 0.1,
        "slowest_over_median": 2.0, "programs": 3, "kernels": 4, "programs_before": 5,
        "first_step_seconds": 6.0, "peak_gib": 7.0,
    }  # fmt: skip
    speeds = {"single": 200.0, "packed": 150.0, "peft-packed": 40.0, "peft-padded": 50.0}
    parts = [
        {"part": part, "tokens_per_second": speed, **figures} for part, speed in speeds.items()
    ]
    lines = table([*parts, {"part": "unpacked", "error": 1}]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| packed | 150 | 1 | 0.75 | 3.00 | 0.500 | 10 |")
    assert "| failed: 1 |" in lines[-1]


def test_mixed_records():
    words = [str(n) for n in range(1000)]
    rows = [{"question": "q", "answer": "a"}] * 200
    found = list(mixed(rows, words, 300, seed=0))
    assert found == list(mixed(rows, words, 300, seed=0)) and len(found) == 400
    cut = [f"{row['question']} {row['answer']}".split() for row in found[1::2]]
    assert all(words[int(piece[0]) : int(piece[0]) + len(piece)] == piece for piece in cut)
    lengths = sorted(map(len, cut))
    assert lengths[0] < 20 and 200 < lengths[-1] <= 300 and lengths[100] < 100


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
