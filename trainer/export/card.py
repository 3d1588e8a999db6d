"""The README.md of what is exported: a model card with the metadata that the hub expects.

https://huggingface.co/docs/hub/model-cards; `huggingface_hub` writes the metadata.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yaml import YAMLError

from trainer import __version__
from trainer.checkpoint.saved import Saved
from trainer.config.config import Config
from trainer.config.validation import local
from trainer.data.sources import SourceNames, hub_ids
from trainer.errors import UserError
from trainer.files import METRICS
from trainer.model.hub import hub_id, resolve_folder
from trainer.records.jsonl import read_metrics
from trainer.tasks.base import Task
from trainer.tasks.registry import TASKS

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_DATA = ("max_length", "packing", "batch_size")
_RANKS = """## Ranks

Components of every update, by transformer block and matrix type{experts}; none where the update is
zero.
"""


@dataclass(frozen=True)
class Training:
    """What a card says of the training."""

    config: Config
    step: int
    scores: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation at `scored`, by name."""
    scored: int = 0
    labels: Mapping[str, Any] = field(default_factory=dict)
    """State of the task's labels."""
    note: str = ""
    """On the quantisation, and which checkpoint it is."""
    hub: str | None = None
    """The base model's id on the hub, where it is known."""

    @property
    def base(self) -> str:
        """What the base model is called: its id on the hub, else its folder's name, without where
        that lies on this machine."""
        return self.hub or Path(self.config.model.id).absolute().name

    @property
    def task(self) -> type[Task]:
        return TASKS[self.config.task.kind]


def training_of(saved: Saved, config: Config, note: str) -> Training:
    """Of a checkpoint; its scores from the metrics of the run that it lies in."""
    step = saved.state["step"]
    lines = read_metrics(saved.checkpoint.parent.parent / METRICS)
    evaluated = [line for line in lines if line["step"] == step and "eval_loss" in line]
    scores = scores_in(evaluated[-1]) if evaluated else {}
    # Known when it was trained: where it is exported, a relative folder may not be there.
    hub = saved.state["hub_id"] if "hub_id" in saved.state else hub_id(config.model)
    return Training(config, step, scores, step, saved.state["labels"], note, hub)


def scores_in(line: Mapping[str, Any]) -> dict[str, float]:
    """The scores in a line of an evaluation."""
    return {
        name: value
        for name, value in line.items()
        if name.startswith("eval_") and isinstance(value, int | float)
    }


def write_adapter_card(
    folder: Path,
    training: Training,
    *,
    kind: str = "LoRA",
    ranks: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    tokens: bool = False,
    resize: str | None = None,
) -> None:
    """Of an adapter's folder. `kind`: PEFT's name; `ranks`: by unit; `notes`: on what loads it;
    `tokens`: it holds rows of tokens; `resize`: argument of `resize_token_embeddings`, where the
    base model's tables lack them."""
    task = training.task
    labels = task.head_outputs(training.labels)
    model_class = task.auto_class.__name__
    base = training.hub or f"path/to/{training.base}"
    given = f'"{base}"' + (f", num_labels={labels}" if labels is not None else "")
    names, first, resized = model_class, "", ""
    if tokens:
        names = ", ".join(sorted(["AutoTokenizer", model_class]))
        first = 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
    if resize is not None:
        resized = f"model.resize_token_embeddings({resize})\n"
    use = f"""from peft import PeftModel
from transformers import {names}

{first}model = {model_class}.from_pretrained({given})
{resized}model = PeftModel.from_pretrained(model, "path/to/this/folder")"""
    tags = [kind.lower()]
    if training.hub is not None:
        tags.append(f"base_model:adapter:{training.hub}")
    title = f"{kind} adapter"
    _write(
        folder,
        training,
        "peft",
        tags,
        [_begin(title, training, use, notes), *_ends(training, ranks)],
    )


def write_model_card(
    folder: Path, training: Training, *, what: str = "merged", notes: Sequence[str] = ()
) -> None:
    """Of a whole model's folder; `what`: merged, or backbone (without what was trained)."""
    name = training.task.auto_class.__name__
    use = f"""from transformers import {name}

model = {name}.from_pretrained("path/to/this/folder")"""
    title = "Backbone" if what == "backbone" else "Fine-tuned model"
    sections = [_begin(title, training, use, notes), *_ends(training, None)]
    _write(folder, training, "transformers", [], sections, relation="finetune")


def write_gguf_card(folder: Path, training: Training, use: str, *, adapter: bool) -> None:
    """Of a folder with a GGUF file and its Modelfile; `use`: commands that run it."""
    title = "LoRA adapter as GGUF" if adapter else "Fine-tuned model as GGUF"
    sections = [_begin(title, training, use, (), language=""), *_ends(training, None)]
    tags = ["gguf", "lora"] if adapter else ["gguf"]
    _write(folder, training, "gguf", tags, sections, relation="adapter" if adapter else "quantized")


def base_license(training: Training) -> dict[str, str]:
    """What the base model's own card says of its licence; {} where it says nothing, or is not
    there."""
    from huggingface_hub import ModelCard

    config = training.config
    if training.hub is None and local(config.model.id) is None:
        return {}  # a folder that is gone: another's model on the hub may be called so
    try:
        folder = resolve_folder(config.model.id, config.model.revision, with_weights=False)
        text = (folder / CARD).read_text(encoding="utf-8")
        said = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (UserError, OSError, ValueError, YAMLError):
        return {}
    return {key: said[key] for key in _LICENSE if isinstance(said.get(key), str)}


def _write(
    folder: Path, training: Training, library: str, tags: Sequence[str], sections: Sequence[str],
    relation: str | None = None,
) -> None:  # fmt: skip
    from huggingface_hub import ModelCard, ModelCardData

    config = training.config
    hub, more = training.hub, base_license(training)
    if hub is not None and relation is not None:
        more["base_model_relation"] = relation
    data = [*dict.fromkeys(name for source, _ in config.data.sources for name in hub_ids(source))]
    card = ModelCardData(
        base_model=hub,
        library_name=library,
        pipeline_tag=training.task.pipeline_tag,
        datasets=data or None,
        tags=[*dict.fromkeys([*tags, config.method.kind, "rankcast"])],
        **more,  # type: ignore[arg-type]
    )
    text = f"---\n{card.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    ModelCard(text)  # raises ValueError for metadata that the hub would refuse to parse
    (folder / CARD).write_text(text, encoding="utf-8")


def _begin(
    title: str, training: Training, use: str, notes: Sequence[str], language: str = "python"
) -> str:
    """The title, how it is used, and on what loads it."""
    config = training.config
    about = (
        f"Of `{training.base}`, trained by rankcast {__version__} "
        f"(`method.kind: {config.method.kind}`)."
    )
    return "\n\n".join(
        [f"# {title}", about, f"```{language}\n{use}\n```", *notes, *filter(None, [training.note])]
    )


def _ends(training: Training, ranks: Mapping[str, int] | None) -> list[str]:
    """Training, scores, ranks."""
    rows = [f"| {key} | {_cell(value)} |" for key, value in _settings(training).items()]
    sections = ["## Training\n\n| | |\n|---|---|\n" + "\n".join(rows)]
    if training.scores:
        scores = [f"| {name} | {value:.4g} |" for name, value in training.scores.items()]
        head = f"## Scores\n\n| after step {training.scored} | |\n|---|---|\n"
        sections.append(head + "\n".join(scores))
    if ranks:
        sections.append(rank_table(ranks))
    return sections


def _settings(training: Training) -> dict[str, Any]:
    """Data and hyperparameters, by configuration key."""
    config = training.config
    found: dict[str, Any] = {"data.train": [_names(source) for source, _ in config.data.sources]}
    held = config.data.eval_sources
    if held or config.data.eval is not None:
        found["data.eval"] = [_names(source) for source in held.values()] or config.data.eval
    found |= {f"data.{key}": getattr(config.data, key) for key in _DATA}
    if config.data.chat_template is not None:
        found["data.chat_template"] = _names(config.data.chat_template)
    found["steps"] = training.step
    found |= {"model.dtype": config.model.dtype, "model.quantization": config.model.quantization}
    found["run.seed"] = config.run.seed
    for section, always in (("optim", ("learning_rate",)), ("method", ("kind", "rank", "alpha"))):
        options = getattr(config, section)
        values = {key: getattr(options, key, None) for key in always}
        values |= options.model_dump(exclude_defaults=True)
        found |= {f"{section}.{key}": value for key, value in values.items()}
    return {key: value for key, value in found.items() if value is not None}


def _names(source: SourceNames) -> str:
    """Sources without the folders of this machine."""
    return ", ".join(map(_shown, [source] if isinstance(source, str) else source))


def _shown(name: str) -> str:
    """A hub id as it is, a local path by its last part."""
    return Path(name).name if local(name) is not None or name.startswith(("/", ".")) else name


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def rank_table(ranks: Mapping[str, int]) -> str:
    """Ranks by unit as a table: a row for each block, a column for each matrix type; of several
    experts the least and the largest."""
    blocks: dict[str, dict[str, list[int]]] = {}
    for name in sorted(ranks, key=_numbered):
        block, kind = _place(name)
        blocks.setdefault(block, {}).setdefault(kind, []).append(ranks[name])
    kinds = sorted({kind for of_block in blocks.values() for kind in of_block})
    rows = [["block", *kinds], ["---"] * (1 + len(kinds))]
    for block, of_block in blocks.items():
        rows.append([block, *(_range(of_block.get(kind, [])) for kind in kinds)])
    several = any(len(found) > 1 for of_block in blocks.values() for found in of_block.values())
    text = _RANKS.format(experts=" (of experts the least to the largest)" if several else "")
    return text + "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _place(name: str) -> tuple[str, str]:
    """(block, matrix type) of a unit by its name: `model.layers.3`, `self_attn.q_proj`."""
    found = re.match(r"(.*?\.\d+)\.(.*)", name)
    block, kind = found.groups() if found else ("", name)
    return block, re.sub(r"\.\d+(?=\.|$)", "", kind)


def _numbered(name: str) -> list[tuple[int, str]]:
    """Sorts block 2 before block 10; a checkpoint does not keep the model's order."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _range(ranks: Sequence[int]) -> str:
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"
