"""The configurations that README and docs/data.md show to a newcomer: each trains, and learns what they say."""

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.campaigns.data_table import ours
from tests.helpers import ROOT, losses, save_random_model
from tests.unit.trainer.data.families import tokenizer_of
from tests.unit.trainer.data.inputs import Input
from trainer.config.config import load_config
from trainer.distributed.world import World
from trainer.run.run import run

KINDS = {"Chat": "SmolLM2", "Instruction and answer": None, "Plain text": None}
"""Headings of docs/data.md, and the chat template of the model below each."""


def blocks(kind: str) -> dict[str, str]:
    """The fenced blocks below a heading of docs/data.md, by language."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    section = text.partition(f"### {kind}\n")[2].partition("\n#")[0]
    return dict(re.findall(r"^```(\w+)\n(.*?)^```", section, re.S | re.M))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    """A base model and a chat model, random and tiny."""
    found = {}
    for family in (None, "SmolLM2"):
        folder = tmp_path_factory.mktemp("model")
        found[family] = save_random_model(folder, "llama", AutoModelForCausalLM)
        tokenizer_of(family).save_pretrained(folder)
    return found


def train(config: str, records: str, model: Path, folder: Path) -> None:
    """Train for two steps on a tiny model, in the folder where the records are."""
    (folder / yaml.safe_load(config)["data"]["train"]).write_text(records)
    (folder / "mine.yaml").write_text(config)
    run(
        load_config(
            folder / "mine.yaml",
            [f"model.id={model}", "run.epochs=null", "run.steps=2", "log.progress=none", "log.every=1", "run.verify=off",
             f"data.cache={folder}/cache", "data.batch_size=4"],
        ),
        World(),
    )  # fmt: skip
    assert len(losses(folder / "runs" / yaml.safe_load(config)["run"]["name"])) == 2


def shown(row: dict, data: dict, family: str | None) -> str:
    """The tokens of a record as the page shows them."""
    (example,) = ours(Input("", row, family, data))
    decode, text, was = tokenizer_of(family).decode, "", 0
    for token, is_learned in zip(example.ids, example.learned, strict=True):
        text += ("«" if is_learned else "»") if is_learned != was else "·" if was else ""
        text, was = text + decode([token]).replace("\n", "\\n"), is_learned
    return text + ("»" if was else "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_commonest_inputs(
    kind: str, models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = blocks(kind)
    assert len(found["yaml"].splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    train(found["yaml"], found["json"] * 4, models[KINDS[kind]], tmp_path)
    data = yaml.safe_load(found["yaml"])["data"]
    del data["train"]
    assert shown(json.loads(found["json"]), data, KINDS[kind]) == found["text"].strip()


def test_the_readme_says_the_same() -> None:
    """One configuration, and a table of records, sections `data`, and learned tokens."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    five = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)[0])
    table = text.partition("|a line of `records.jsonl`|")[2].partition("\n\n")[0]
    lines = [re.findall(r"`([^`]+)`\|", line) for line in table.splitlines()[2:]]
    for (kind, family), (record, data, learned) in zip(KINDS.items(), lines, strict=True):
        found = blocks(kind)
        ours = {**yaml.safe_load(found["yaml"]), "run": five["run"], "model": five["model"]}
        assert ours == {**five, "data": yaml.safe_load(data)}
        assert json.loads(record) == json.loads(found["json"])
        assert found["text"].strip().endswith(f"«{learned}»".replace("\\|", "|")), family
