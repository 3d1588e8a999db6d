"""Hostile files: damaged at random, or made to mislead. Every reader either takes one or refuses it
with one line; it never fails in another way, hangs, fills the memory, or executes anything.

RANKCAST_ALL=1: thousands of examples a reader instead of about a hundred.
"""

import functools
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapters.decision import Decision
from tests.helpers import QUICKSTART
from tests.hostile import (
    attempt,
    damaged,
    fuzz,
    hostile_json,
    json_bytes,
    retyped,
    written,
)
from tests.unit.adapters.methods.harness import Bench
from trainer.comparison.plan import read_comparison
from trainer.config.config import Config, load_config, parse_config
from trainer.config.data_options import DataOptions
from trainer.data.tokenise import prepare, read_labels
from trainer.decisions.log import record
from trainer.decisions.replay import Replay
from trainer.records.jsonl import keep_lines, read_metrics
from trainer.report.report import read_run
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions
from trainer.tasks.sequence_classification import (
    SequenceClassification,
    SequenceClassificationOptions,
)

# --- the configuration

RAW: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text())
FULL = load_config(QUICKSTART).model_dump(mode="json")


@fuzz()
@given(content=damaged(QUICKSTART.read_bytes()))
def test_config_file(folder, content):
    path = written(folder, "run.yaml", content)
    config = attempt(folder, lambda: load_config(path))
    if isinstance(config, Config):
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


@fuzz()
@given(raw=retyped(FULL), as_yaml=st.booleans())
def test_config_of_other_values(folder, raw, as_yaml):
    if as_yaml:
        try:
            text = yaml.safe_dump(raw, allow_unicode=True)
        except RecursionError:
            return
        path = written(folder, "run.yaml", text.encode(errors="surrogatepass"))
        attempt(folder, lambda: load_config(path))
    elif isinstance(raw, dict):
        config = attempt(folder, lambda: parse_config(raw))
        if isinstance(config, Config):
            attempt(folder, config.to_yaml)


KEYS = [f"{section}.{key}" for section, values in FULL.items() for key in values]
SCALARS = [
    "",
    "null",
    "[",
    "{a: 1}",
    "-1",
    "1e999",
    ".nan",
    "0x" + "f" * 5000,
    "!!int ''",
    "\0",
    "&a [*a]",
    "a" * 999,
]


@fuzz()
@given(
    overrides=st.lists(
        st.one_of(
            st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(SCALARS) | st.text(max_size=9)),
            st.text(max_size=30),
        ),
        max_size=4,
    )
)  # fmt: skip
def test_overrides(folder, overrides):
    attempt(folder, lambda: load_config(QUICKSTART, overrides))


BASE = json_bytes({
    "base": str(QUICKSTART), "overrides": ["run.steps=3"], "learning_rates": [1e-3, 2e-3],
    "seeds": [0, 1], "methods": {"lora": [], "pissa": ["method.kind=pissa"]},
})  # fmt: skip


@fuzz()
@given(content=hostile_json(json.loads(BASE)))
def test_comparison_file(folder, content):
    path = written(folder, "comparison.yaml", content)
    attempt(folder, lambda: read_comparison(path))


# --- records

ROWS = [
    {"prompt": "two and two?", "completion": "four", "text": "a b", "label": index % 2}
    | {"instruction": "add", "input": "2 2", "output": "4"}
    | {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    for index in range(4)
]
TABLE = (
    "prompt,completion,text,label,instruction,output\n" + 'a,"b ""c""",d,1,e,f\ng,h,"i\nj",0,k,l\n'
)
FORMATS = ["auto", "prompt_completion", "alpaca", "messages", "text"]


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "json": hostile_json(ROWS),
    "jsonl": st.one_of(
        st.lists(st.sampled_from(ROWS).flatmap(retyped).map(json_bytes), max_size=3).map(b"\n".join),
        damaged(b"\n".join(map(json_bytes, ROWS))),
    ),
    "csv": damaged(TABLE.encode()),
    "tsv": damaged(TABLE.replace(",", "\t").encode()),
    "txt": damaged("Once upon a time\n\nand \u2028 they \u00e9 lived\n \n".encode()),
    "parquet": damaged(parquet()),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(root):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "configs/quickstart/model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content + '</s>' }}{% endfor %}"
    )
    found: list[Any] = [CausalLM(CausalLMOptions(), tokenizer)]
    for problem in ("classification", "regression"):
        options = SequenceClassificationOptions(problem=problem)
        found.append(SequenceClassification(options, tokenizer))
    return found


@pytest.mark.parametrize("suffix", list(CONTENTS))
@fuzz(usual=60)
@given(data=st.data())
def test_records(folder, tasks, suffix, data):
    path = written(folder, f"data.{suffix}", data.draw(CONTENTS[suffix]))
    task = data.draw(st.sampled_from(tasks))
    options = DataOptions(
        train=str(path),
        cache=str(folder / "cache"),
        format=data.draw(st.sampled_from(FORMATS)) if task is tasks[0] else "auto",
        on_bad_record=data.draw(st.sampled_from(["stop", "skip"])),
        quoting=data.draw(st.sampled_from(["standard", "none"])),
        on_long_record=data.draw(st.sampled_from(["truncate", "drop", "stop"])),
    )

    def read() -> None:
        if task is not tasks[0]:
            task.learn_labels(read_labels(str(path), "train", options))
        held = prepare(str(path), "train", None, options, task)
        assert len(held) == held.counts.examples >= held.counts.used > 0
        for index in range(len(held)):
            assert held[index].input_ids

    attempt(folder, read)


COUNTS = {"records": 4, "used": 4, "truncated": 0, "dropped": 0, "bad": 0, "tokens": 40}


@fuzz()
@given(data=st.data())
def test_cache_of_tokens(folder, tasks, data):
    path = written(folder, "good.jsonl", b"\n".join(map(json_bytes, ROWS)))
    options = DataOptions(train=str(path), cache=str(folder / "kept"))
    key = prepare(str(path), "train", None, options, tasks[0]).key
    cached = folder / "kept" / key
    tokens = (cached / "tokens.arrows").read_bytes()
    counts = (cached / "counts.json").read_bytes()
    if data.draw(st.booleans()):
        (cached / "counts.json").write_bytes(data.draw(hostile_json(COUNTS)))
    else:
        (cached / "tokens.arrows").write_bytes(data.draw(damaged(tokens)))
    try:
        attempt(folder, lambda: prepare(str(path), "train", None, options, tasks[0]))
    finally:
        (cached / "tokens.arrows").write_bytes(tokens)
        (cached / "counts.json").write_bytes(counts)


# --- what runs wrote

LINES = [
    {"step": step, "loss": 2.0 / step, "eval_loss": 2.0, "learning_rate": 1e-3, "active_parameters": 9}
    for step in range(1, 5)
]  # fmt: skip


def hostile_lines(lines: list[dict]) -> st.SearchStrategy[bytes]:
    return st.one_of(
        retyped(lines).map(lambda kept: b"\n".join(map(json_bytes, kept)) if isinstance(kept, list) else b"1"),
        damaged(b"\n".join(map(json_bytes, lines))),
    )  # fmt: skip


@fuzz()
@given(content=hostile_lines(LINES))
def test_metrics(folder, content):
    path = written(folder, "metrics.jsonl", content)
    attempt(folder, lambda: read_metrics(path))
    attempt(folder, lambda: keep_lines(path, lambda line: line["step"] <= 2))


UNITS = [
    {"name": f"layers.{i}.q", "layer": i, "kind": "q", "out_features": 8, "in_features": 8}
    for i in range(3)
]
DECISIONS = [
    {"step": step, "ranks": {u["name"]: 1 for u in UNITS}, "locations": {u["name"]: "minor" for u in UNITS},
     "omega": {u["name"]: 0.5 for u in UNITS}, "survivors": [u["name"] for u in UNITS]}
    for step in range(3)
]  # fmt: skip


@fuzz()
@given(data=st.data())
def test_report_of_a_run(folder, data):
    valid = {
        "config.yaml": json_bytes({"run": {"name": "x"}, "method": {"kind": "lelora", "rank": 4}}),
        "units.json": json_bytes(UNITS),
        "metrics.jsonl": b"\n".join(map(json_bytes, LINES)),
        "allocation.jsonl": b"\n".join(map(json_bytes, DECISIONS)),
    }
    for name, content in valid.items():
        written(folder, name, content)
    name = data.draw(st.sampled_from(list(valid)))
    parts = {"metrics.jsonl": LINES, "allocation.jsonl": DECISIONS}
    if name in parts:
        content = data.draw(hostile_lines(parts[name]))
    else:
        content = data.draw(hostile_json(json.loads(valid[name])))
    written(folder, name, content)
    attempt(folder, lambda: read_run(folder))


REPLAYED: dict[str, dict[str, Any]] = {
    "dylora": {},
    "lalora": {},
    "adalora": {"rank": 4, "tinit": 0, "tfinal": 1, "delta_t": 1},
    "rlora": {"rank": 4, "keep": 2},
    "weightlora": {"rank": 4, "warmup_steps": 2, "keep": 2},
    "weightlora_plus": {"rank": 4, "warmup_steps": 2, "keep": 2, "expand": "qr"},
    "lelora": {"rank": 2, "ranks": [0, 2], "policy": {"mode": "uniform"}},
}


@functools.cache
def recorded(kind: str) -> list[dict]:
    """What a run of four steps records."""
    bench = Bench(kind, REPLAYED[kind], steps=4)
    bench.run(4)
    decisions = enumerate(bench.decisions)
    return [
        record(step, bench.method, decision) for step, decision in decisions if decision is not None
    ]


def with_digests(content: bytes) -> bytes:
    """The lines with the digests that they ought to have, as someone who means harm writes them."""
    lines = []
    for line in content.split(b"\n"):
        try:
            value = json.loads(line)
            digest = Decision.from_plain(value).digest()
            lines.append(json_bytes({**value, "digest": digest}))
        except (ValueError, TypeError, AttributeError, RecursionError):
            lines.append(line)
    return b"\n".join(lines)


@pytest.mark.parametrize("kind", list(REPLAYED))
@fuzz(usual=25, many=1000)
@given(data=st.data())
def test_replay(folder, kind, data):
    """What is taken from a record can be carried out."""
    content = data.draw(hostile_lines(recorded(kind)))
    if data.draw(st.booleans()):
        content = with_digests(content)
    path = written(folder, "decisions.jsonl", content)
    bench = Bench(kind, REPLAYED[kind], begin=False, steps=4)

    def replay() -> None:
        decisions = Replay(path, bench.method, 0, 4)
        for step in range(4):
            decision = decisions.decide(step) if bench.method.due(step) else None
            if decision is not None:
                bench.method.apply(decision)
                bench.method.scalars()

    attempt(folder, replay)
