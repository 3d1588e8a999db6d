"""What is given as a model and is none: the line says what it is, and which key takes it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import TINY
from trainer.config.sections import ModelOptions
from trainer.errors import UserError
from trainer.model.hub import load_model_config, load_tokenizer

ADAPTER = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
FOLDER = "accepted: a folder with config.json and .safetensors files, or a hub id"


def of_adapter(base: str, name: str) -> str:
    return f"an adapter, no model; accepted: model.id={base} with model.adapter={name}"


CASES = {
    "an adapter": ({"adapter_config.json": ADAPTER}, of_adapter("org/base", "NAME")),
    "an adapter with a tokenizer and config.json": (
        {"adapter_config.json": ADAPTER, "config.json": "{}", "adapter_model.safetensors": ""},
        of_adapter("org/base", "NAME"),
    ),
    "an adapter of nothing known": ({"adapter_config.json": "{"}, of_adapter("its base model", "NAME")),
    "a run": (
        {"config.yaml": "", "metrics.jsonl": ""},
        "a run, no model; accepted: the model that it trained, with model.adapter=NAME",
    ),
    "GGUF files": ({"a.gguf": "", "README.md": ""}, f"a folder of GGUF files; {FOLDER}"),
    "another folder": ({"README.md": ""}, f"no config.json in it; {FOLDER}"),
    "an empty folder": ({}, f"no config.json in it; {FOLDER}"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_folders_that_are_no_model(tmp_path: Path, name: str) -> None:
    files, reason = CASES[name]
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    expected = f"model.id: {tmp_path}: {reason.replace('NAME', str(tmp_path))}"
    for read in (load_tokenizer, lambda options: load_model_config(tmp_path, options)):
        with pytest.raises(UserError) as caught:
            read(ModelOptions(id=str(tmp_path)))
        assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "what"), [("a.gguf", "a GGUF file"), ("model.safetensors", "a file")]
)
def test_files_that_are_no_model(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelOptions(id=str(tmp_path / name)))
    assert str(caught.value) == f"model.id: {tmp_path / name}: {what}; {FOLDER}"


def test_a_tokenizer_may_lie_beside_an_adapter(tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, tmp_path / file)
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    tokenizer = load_tokenizer(ModelOptions(id=str(TINY), tokenizer=str(tmp_path)))
    assert (
        tokenizer("a")["input_ids"] == load_tokenizer(ModelOptions(id=str(TINY)))("a")["input_ids"]
    )
    with pytest.raises(UserError, match=r"^model\.tokenizer: \./none: no such folder"):
        load_tokenizer(ModelOptions(id=str(TINY), tokenizer="./none"))
