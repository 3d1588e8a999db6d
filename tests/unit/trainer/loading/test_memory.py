"""A rank holds the quantised model and one or two unquantised matrices while it loads, never the
whole unquantised model: measured in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import shared
from tests.helpers import ROOT, environment, finish, quick_config, sample

PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from trainer.config.config import parse_config
from trainer.distributed.world import World
from trainer.engine.single import SingleEngine
from trainer.loading.load import load_backbone
from trainer.model.build import build
from trainer.model.hub import load_tokenizer
from trainer.tasks.registry import TASKS

def anonymous():  # resident and private: pages of mapped files come and go as the kernel likes
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

config = parse_config(json.loads(Path(sys.argv[1]).read_text()))
task = TASKS["causal_lm"](config.task, load_tokenizer(config.model))
import bitsandbytes  # imported late by the formats: not counted as the model's memory
build(config, task, torch.device("cpu"))
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
loaded = load_backbone(config, task, SingleEngine(config, World()), World())
done = True
thread.join()
held = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
print(json.dumps({"peak": peak - before, "held": held}))
"""


@pytest.mark.parametrize("quantization", sample(["nf4", "int8"], "nf4"))
def test_peak_is_the_quantised_model_and_a_matrix_or_two(quantization, tmp_path):
    """books-llama-28m's architecture, three times as wide and deeper: 150 M parameters."""
    source = shared("models/books-llama-28m")
    shape = AutoConfig.from_pretrained(source)
    shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers = 1024, 2816, 12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="100MB")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "model")
    matrix = max(p.numel() for n, p in model.named_parameters() if "layers" in n)
    assert matrix == 2816 * 1024
    del model
    config = quick_config(
        tmp_path, f"model.id={tmp_path}/model", f"model.quantization={quantization}"
    )
    (tmp_path / "config.json").write_text(json.dumps(config.model_dump()))
    # Every tensor a mapping of its own, so that what is resident is what is alive.
    at_once_returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json")],
        cwd=ROOT, env=environment() | at_once_returned, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    code, out, err = finish(process)
    assert code == 0, err[-3000:]
    measured = json.loads(out.splitlines()[-1])
    assert measured["peak"] <= measured["held"] + 2 * 4 * matrix + 10e6, measured
