"""The card of an export: metadata that the hub's own library reads, and what was trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.helpers import TINY, quick_config, save_random_model
from trainer.config.config import Config, parse_config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.export.card import (
    Training,
    base_license,
    rank_table,
    write_adapter_card,
    write_model_card,
)
from trainer.export.export import export_run
from trainer.model.hub import hub_id
from trainer.run.run import run

LICENSED = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.b/c\n---\n# Base\n"


def hub_config(**data: object) -> Config:
    return parse_config({
        "model": {"id": "owner/base", "quantization": "nf4"},
        "data": {"train": "openai/gsm8k", "eval": 0.1, "prompt": "{q}", "completion": "a", **data},
        "method": {"kind": "lora", "rank": 4},
        "run": {"name": "a", "steps": 3},
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base model that has a card, end tokens of its own, and a chat template."""
    tmp = tmp_path_factory.mktemp("card")
    base = save_random_model(tmp / "base", "llama", AutoModelForCausalLM)
    (base / "README.md").write_text(LICENSED)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(base)
    config = quick_config(
        tmp, f"model.id={base}", "model.quantization=nf4", "run.steps=2", "method.rank=3",
        "method.targets=[q_proj,down_proj]",
    )  # fmt: skip
    run(config, World())
    return config.run_folder


def test_metadata_of_a_model_from_the_hub(tmp_path: Path) -> None:
    training = Training(hub_config(), 3, {"eval_loss": 1.25}, 3, note="Of nf4.", hub="owner/base")
    ranks = {"model.layers.0.q_proj": 4, "model.layers.1.q_proj": 2}
    write_adapter_card(tmp_path, training, ranks=ranks, notes=["A note."])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "owner/base", "library_name": "peft", "pipeline_tag": "text-generation",
        "datasets": ["openai/gsm8k"],
        "tags": ["lora", "base_model:adapter:owner/base", "rankcast"],
    }  # fmt: skip
    for line in (
        "| data.train | openai/gsm8k |", "| data.eval | 0.1 |", "| method.rank | 4 |",
        "| optim.learning_rate | 0.0002 |", "| model.quantization | nf4 |", "| steps | 3 |",
        "| eval_loss | 1.25 |", "| model.layers.1 | 2 |", "Of nf4.", "A note.",
        'AutoModelForCausalLM.from_pretrained("owner/base")',
    ):  # fmt: skip
        assert line in card.text
    write_model_card(tmp_path, training)
    merged = ModelCard.load(tmp_path / "README.md").data
    assert (merged.library_name, merged.base_model_relation) == ("transformers", "finetune")


@pytest.mark.parametrize("path, said, expected", [
    ("models--owner--name--v1/snapshots/abc", None, "owner/name--v1"),
    ("somewhere/name", None, None), ("somewhere/name", "owner/base", "owner/base"),
    ("somewhere/name", "/home/me/base", None), ("somewhere/name", "./out/base", None),
    ("somewhere/name", "out/base", None),
])  # fmt: skip
def test_hub_id_of_a_local_folder(
    path: str, said: str | None, expected: str | None, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / "out/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / path / "config.json").write_text(json.dumps({"_name_or_path": said}))
    for name in (str(tmp_path / path), path):  # somewhere/name looks like an id, but is a folder
        assert hub_id(SimpleNamespace(id=name)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["/gone/model", "./gone/model", "a/b/c", "gone"])
def test_a_folder_that_is_gone_is_no_hub_id(name: str) -> None:
    assert hub_id(SimpleNamespace(id=name)) is None  # type: ignore[arg-type]


def test_a_relative_folder_that_is_gone_when_it_is_exported(tmp_path: Path, monkeypatch) -> None:
    """Exported elsewhere, `models/base` is still no model of the hub."""
    base = save_random_model(tmp_path / "models/base", "llama", AutoModelForCausalLM)
    (base / "README.md").write_text(LICENSED)
    data = TINY.parent / "train.jsonl"
    config = quick_config(tmp_path, "model.id=models/base", "data.eval=null", "run.steps=1",
                          f"data.train={data}")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run(config, World())
    monkeypatch.chdir(tmp_path / "runs")
    export_run(config.run_folder, tmp_path / "there", World())
    card = ModelCard.load(tmp_path / "there/README.md")
    assert card.data.base_model is None and "Of `base`, trained" in card.text
    assert 'from_pretrained("path/to/base")' in card.text
    for folder in (config.run_folder / "adapter", tmp_path / "there"):
        assert "models/base" not in (folder / "README.md").read_text()
    again = export_run(
        config.run_folder, tmp_path / "named", World(), overrides=["model.id=owner/base"]
    )
    assert again and ModelCard.load(tmp_path / "named/README.md").data.base_model == "owner/base"


@pytest.mark.parametrize("text, expected", [
    (LICENSED, {"license": "other", "license_name": "mine", "license_link": "https://a.b/c"}),
    ("---\nlicense: [mit]\n---\n", {}), ("no metadata", {}), (None, {}), ("---\n{\n---\n", {}),
])  # fmt: skip
def test_licence_of_the_base(text: str | None, expected: dict, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    options = SimpleNamespace(id=str(tmp_path), revision=None)
    training = Training(SimpleNamespace(model=options), 1)  # type: ignore[arg-type]
    assert base_license(training) == expected


def test_experts_share_a_cell() -> None:
    ranks = {f"model.layers.3.mlp.experts.down_proj.{e}": 2 + e for e in range(3)}
    later = {"model.layers.12.mlp.experts.down_proj.0": 1}
    table = rank_table({**later, "lm_head": 5, **ranks}).splitlines()
    assert table[-5:] == [
        "| block | lm_head | mlp.experts.down_proj |", "| --- | --- | --- |", "|  | 5 |  |",
        "| model.layers.3 |  | 2–4 |", "| model.layers.12 |  | 1 |",
    ]  # fmt: skip


def test_the_folder_has_all_that_serving_needs(trained: Path, tmp_path: Path) -> None:
    export_run(trained, tmp_path / "again", World(), measure=False)
    export_run(trained, tmp_path / "merged", World(), what="merged", measure=False)
    for folder in (trained / "adapter", tmp_path / "again", tmp_path / "merged"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 7]
        card = ModelCard.load(folder / "README.md")
        assert (card.data.license, card.data.license_name) == ("other", "mine")
        assert "base_model" not in card.data.to_dict()  # a folder of this machine
        assert "| eval_loss |" in card.text and "| data.train | train.jsonl |" in card.text
    first, again = (
        (f / "README.md").read_text() for f in (trained / "adapter", tmp_path / "again")
    )
    assert "| model.layers.1 | 3 | 3 |" in first and "(Frobenius)" in first
    assert first.partition("## Training")[2] == again.partition("## Training")[2]


@pytest.mark.parametrize("given, stored, merged", [
    ("auto", "bfloat16", "BF16"), ("auto", "float32", "F32"), ("float16", "bfloat16", "F16"),
])  # fmt: skip
def test_dtype_of_a_merged_model(given: str, stored: str, merged: str, tmp_path: Path) -> None:
    """By default that of the base's files, whatever it was trained in; rounded once."""
    model = TINY
    if stored == "float32":
        model = save_random_model(tmp_path / "base", "llama", AutoModelForCausalLM)
    config = quick_config(tmp_path, f"model.id={model}", "run.steps=1", "data.eval=null")
    run(config, World())
    export_run(config.run_folder, tmp_path / "out", World(), what="merged", dtype=given)
    export_run(config.run_folder, tmp_path / "whole", World(), what="merged", dtype="float32")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == {
        "BF16": "bfloat16", "F32": "float32", "F16": "float16",
    }[merged]  # fmt: skip
    file = "model-00001.safetensors"
    with (
        safe_open(tmp_path / "out" / file, "pt") as out,
        safe_open(tmp_path / "whole" / file, "pt") as whole,
    ):
        for name in out.keys():
            assert out.get_slice(name).get_dtype() == merged
            value = out.get_tensor(name)
            assert (value == whole.get_tensor(name).to(value.dtype)).all()


def test_an_adapter_has_no_dtype(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype: float16 given for an adapter; accepted: auto"):
        export_run(trained, tmp_path / "out", World(), dtype="float16")
