"""The configurations that README and docs/data.md show to a newcomer: each trains, and learns what they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.helpers import ROOT, save_random_model
from tests.unit.trainer.data.families import tokenizer_of
from trainer.config.config import load_config
from trainer.data.dataset import prepare
from trainer.run.run import run
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

KINDS = ["Chat", "Instruction and answer", "Plain text"]


def blocks(kind: str) -> dict[str, str]:
    """The fenced blocks below a heading of docs/data.md, by language."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    section = text.partition(f"### {kind}\n")[2].partition("\n#")[0]
    return dict(re.findall(r"^```(\w+)\n(.*?)^```", section, re.S | re.M))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A chat model and a base model, random and tiny."""
    found = {}
    for name, family in (("chat", "SmolLM2"), ("base", None)):
        found[name] = save_random_model(tmp_path_factory.mktemp(name), "llama", AutoModelForCausalLM)
        tokenizer_of(family).save_pretrained(found[name])
    return found


def shown(ids: list[int], learned: list[int], tokenizer: Any) -> str:
    """Tokens as the page shows them."""
    text, was = "", 0
    for token, is_learned in zip(ids, learned, strict=True):
        text += ("«" if is_learned else "»") if is_learned != was else "·" if was else ""
        text, was = text + tokenizer.decode([token]).replace("\n", "\\n"), is_learned
    return text + ("»" if was else "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_commonest_inputs(kind: str, models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(kind)
    assert len(found["yaml"].splitlines()) == 5
    train(found["yaml"], found["json"] * 4, models["chat" if kind == "Chat" else "base"], tmp_path, monkeypatch)
    config = load_config(tmp_path / "mine.yaml", [])
    tokenizer = tokenizer_of("SmolLM2" if kind == "Chat" else None)
    data = prepare(config.data.train, "train", None, config.data, CausalLM(CausalLMOptions(), tokenizer))
    assert shown(data.example(0).input_ids, data.example(0).loss_mask, tokenizer) == found["text"].strip()


def train(
    config: str, records: str, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains for two steps as a user would, in a folder of his own, on a tiny model."""
    monkeypatch.chdir(folder)
    name = yaml.safe_load(config)["data"]["train"]
    (folder / name).write_text(records)
    (folder / "mine.yaml").write_text(config)
    run(load_config(folder / "mine.yaml", [
        f"model.id={model}", "run.epochs=null", "run.steps=2", "log.progress=none", f"data.cache={folder}/cache",
        "data.batch_size=4", "method.rank=4"]))  # fmt: skip
    losses = [json.loads(line) for line in next(folder.glob("runs/*/metrics.jsonl")).read_text().splitlines()]
    assert losses
