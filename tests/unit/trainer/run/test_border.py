"""What would hang, or come as a library's own error, ends in one line."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from unittest.mock import patch

import pytest
from transformers import AutoTokenizer

from tests.helpers import ROOT, TINY, environment, losses, quick_config
from trainer.config.data_options import DataOptions
from trainer.config.sections import ModelOptions
from trainer.data import templates
from trainer.data.formats import to_records
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.model.hub import load_tokenizer
from trainer.records.heartbeat import read_heartbeat
from trainer.records.jsonl import read_metrics
from trainer.run.run import run
from trainer.tasks.causal_lm import CausalLM


@pytest.fixture
def model(tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    return tmp_path / "model"


def config(tmp, *more):
    return quick_config(tmp, "run.steps=1", "method.rank=2", "data.eval=null", *more)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_named_pipe_in_a_model_is_not_waited_for(name, model, tmp_path):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=rf"model\.id: .*/{name}: neither a file nor a folder"):
        run(config(tmp_path, f"model.id={model}"), World())


def test_a_named_pipe_among_records_is_not_waited_for(tmp_path):
    for name in ("metrics.jsonl", "heartbeat.json", "data.jsonl"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="no regular file"):
        read_metrics(tmp_path / "metrics.jsonl")
    assert read_heartbeat(tmp_path) == {}
    with pytest.raises(UserError, match="not a data file"):
        run(config(tmp_path, f"data.train={tmp_path}/data.jsonl"), World())


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_local_experts"])
def test_more_layers_than_any_model_has_are_not_built(key, model, tmp_path):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 10**7}))
    with pytest.raises(UserError, match=rf"config\.json: {key}: 10000000 given; accepted: at"):
        run(config(tmp_path, f"model.id={model}"), World())


def test_a_newline_in_config_json_is_no_other_backbone(model, tmp_path):
    run(config(tmp_path, f"model.id={model}"), World())
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    run(config(tmp_path, f"model.id={model}", "run.steps=2"), World())
    assert len(losses(tmp_path / "runs/quickstart")) == 2


def replacing(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = {
    "a long text for a letter": [replacing("a" * 2000, String="e")],
    "letters that double": [replacing("ee", String="e")] * 40,
    "something between all letters": [replacing("-", Regex="x*")] * 40,
    "a long text for any letter": [replacing("ab" * 700, Regex="[a-z]")],
    "a table of long texts": [
        {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(bytes([4, 0, 0, 0]) + b"trie" + b"x" * 5000),
        }
    ],
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_normalizer_that_makes_texts_very_long_is_refused(kind, model, tmp_path):
    """It would compute for minutes, and then end the process (tokenizers aborts for want of
    memory)."""
    file = model / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["normalizer"] = {"type": "Sequence", "normalizers": GROWING[kind]}
    file.write_text(json.dumps(whole, default=bytes.decode))
    with pytest.raises(UserError, match=r"model\.id: .*its normalizer can make .* of one; accept"):
        load_tokenizer(ModelOptions(id=str(model)))


def test_usual_normalizers_are_not_refused(model):
    for normalizer in (
        None,
        {"type": "NFKC"},
        {
            "type": "Sequence",
            "normalizers": [replacing("▁", String=" "), replacing(" ", Regex=" +")],
        },
    ):
        file = model / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": normalizer}))
        load_tokenizer(ModelOptions(id=str(model)))


class Panic(BaseException):
    """As Rust's panics are raised: no Exception."""


def test_a_panic_inside_the_tokenizer_is_one_line(tmp_path):
    with patch.object(CausalLM, "encode", side_effect=Panic("index out of range\nin a loop")):
        with pytest.raises(UserError, match=r"the tokenizer failed \(index out of range\);"):
            run(config(tmp_path), World())


PANICS = """
from trainer.distributed.failures import guarded
class Panic(BaseException): pass
with guarded():
    raise Panic("index out of range\\nin a loop")
"""


def test_any_other_panic_is_one_line_too():
    ended = subprocess.run(
        [sys.executable, "-c", PANICS], capture_output=True, text=True, cwd=ROOT, env=environment(),
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (1, "error: a library failed: index out of range\n")


def test_a_chat_template_that_loops_is_ended(monkeypatch):
    """Whatever it catches; and what takes less time is not."""
    monkeypatch.setattr(templates, "_SECONDS", 0.3)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    body = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tokenizer.chat_template = loops + body
    began = time.process_time()
    with pytest.raises(UserError, match=r"does not end within 0\.3 s; accepted: a template"):
        to_records(row, "messages", DataOptions(train="x"), tokenizer)
    assert time.process_time() - began < 20
    assert sum(range(10**6)) == 499999500000, "nothing is raised later"
    tokenizer.chat_template = body
    monkeypatch.setattr(templates, "_SECONDS", 60.0)
    (record,) = to_records(row, "messages", DataOptions(train="x"), tokenizer)
    assert "".join(text for text, _ in record.segments) == "ab"
