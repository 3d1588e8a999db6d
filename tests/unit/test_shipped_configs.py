"""The configurations in configs/ name what an outside user has, and train here with a tiny model of
their architecture and records in the form of their data."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoModel, AutoModelForCausalLM

from tests.helpers import ROOT, losses, sample, save_random_model
from tests.images import save_images, save_vit
from tests.unit.test_paper_configs import AUTO, T5, rows
from trainer.config.config import load_config
from trainer.data.dataset import Counts
from trainer.data.sources import hub_ids
from trainer.distributed.world import World
from trainer.records.jsonl import read_metrics
from trainer.run.run import run
from trainer.run.without_effect import on_keys

FOLDER = ROOT / "configs"
SHIPPED = {  # name: (architecture, data, a score of its evaluations)
    "arc_easy_lora": ("llama", "arc", "accuracy_norm"),
    "glue_minilm_lora": ("bert", "pairs", "f1"),
    "glue_sst2_lora": ("llama", "glue", "accuracy"),
    "squad_lora": ("deberta-v2", "squad", "exact_match"),
    "vit_lora": ("vit", "images", "accuracy"),
    "xsum_t5_lora": ("t5", "xsum", "token_accuracy"),
    **{
        f"gsm8k_{name}": ("llama", "gsm8k", "perplexity")
        for name in (
            "eva",
            "lalora",
            "lalora_qv",
            "lelora",
            "lora",
            "weightlora",
            "weightlora_plus",
        )
    },
}
LOCAL = {
    "quickstart", "llama135m_random", "llama1b_random", "llama8b_random", "llama70b_random",
    "mixtral_random",
}  # fmt: skip
"""Whose models and data are in configs/ too; trained by other tests."""


def test_every_configuration_names_what_a_user_has():
    files = sorted(FOLDER.glob("**/*.yaml"))
    assert {file.stem for file in FOLDER.glob("*.yaml")} == SHIPPED.keys() | LOCAL
    for file in files:
        config = load_config(file)
        if file.stem in LOCAL:
            assert (ROOT / config.model.id).is_dir() and (ROOT / str(config.data.train)).is_file()
            continue
        sources = [config.data.train]
        if not isinstance(config.data.eval, float):
            given = config.data.eval
            sources += given.values() if isinstance(given, dict) else [given]
        for name in [config.model.id, *sources]:
            known = name.startswith("LLM-Adapters/") and "AGI-Edgerunners" in file.read_text()
            assert known or hub_ids(name) == [name], f"{file.name}: {name}"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("**/*.yaml")), ids=lambda file: file.stem)
def test_no_key_of_a_configuration_is_without_effect(file, monkeypatch):
    where = "trainer.run.without_effect.located"  # not all data are here
    monkeypatch.setattr(where, lambda source, split, own: [f"{source} {split}"])
    config = load_config(file)
    is_auto = config.data.format == "auto"
    kind = config.task.data_formats[0] if is_auto else config.data.format
    if is_auto and config.task.kind == "multiple_choice":
        kind = "multiple_choice"
    data = SimpleNamespace(counts=Counts(formats={kind: 1}))
    assert on_keys(config, data, {}) == []


def local_rows(kind: str) -> list[dict]:
    if kind != "pairs":
        return rows(kind)
    return [
        {"sentence1": row["sentence"], "sentence2": "So it is.", "label": row["label"]}
        for row in rows("glue")
    ]


@pytest.mark.parametrize("name", sample(SHIPPED, "arc_easy_lora", "glue_minilm_lora", "squad_lora"))
def test_it_trains(name, tmp_path):
    architecture, kind, score = SHIPPED[name]
    if architecture == "vit":
        save_vit(tmp_path / "model")
    else:
        auto = (AUTO | {"bert": AutoModel}).get(architecture, AutoModelForCausalLM)
        start = T5 if architecture == "t5" else {}
        save_random_model(tmp_path / "model", architecture, auto, **start)
    if kind == "images":
        source = save_images(tmp_path / "images/train", 24).parent
        shutil.copytree(source / "train", source / "test")
    else:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in local_rows(kind)[:60]))
    given = [
        f"model.id={tmp_path}/model", f"run.dir={tmp_path}/runs", f"data.cache={tmp_path}/cache",
        f"data.train={source}", f"data.eval={source}", "data.eval_records=8", "run.epochs=null",
        "run.steps=6", "log.every=1", "log.progress=none", "log.tensorboard=false",
        "data.max_length=160", "data.batch_size=16", "engine.kind=single", "run.verify=off",
        "checkpoint.every=0",
    ]  # fmt: skip
    given += ["data.image=image"] if kind == "images" else []
    config = load_config(FOLDER / f"{name}.yaml", given)
    run(config, World())
    assert len(losses(config.run_folder)) == 6
    (*_, last) = read_metrics(config.run_folder / "metrics.jsonl")
    assert f"eval_{score}" in last
    assert (config.run_folder / "adapter/adapter_model.safetensors").is_file()
