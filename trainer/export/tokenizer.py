"""What generation needs beside an exported model or adapter: the tokenizer, with the chat template
that the run was trained with, and generation_config.json."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.config import Config
from trainer.data.templates import Templates
from trainer.errors import UserError
from trainer.model.hub import resolve_folder
from trainer.model.image_processor import load_processor

_GENERATION = "generation_config.json"


def save_tokenizer(tokenizer: Any, template: Templates | None, folder: Path) -> None:
    """`template`: the one that `data.chat_template` set, as `set_template` gives it; None: the
    tokenizer's own."""
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own if template is None else template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def save_tokenizer_of(config: Config, state: Mapping[str, Any], folder: Path) -> None:
    """`save_tokenizer` and `copy_generation_config` of a checkpoint. Where the model is no longer
    available, the template that the run set, if it did, alone."""
    template = state.get("chat_template")
    try:
        save_tokenizer(load_processor(config), template, folder)
        copy_generation_config(config, folder)
    except UserError:
        templates = {"": template} if isinstance(template, str) else template or {}
        for name, text in templates.items():
            suffix = f"_{name}" if name not in ("", "default") else ""
            (folder / f"chat_template{suffix}.jinja").write_text(text, encoding="utf-8")


def copy_generation_config(config: Config, folder: Path) -> None:
    """The base model's, where it is still there and has one."""
    try:
        base = resolve_folder(config.model.id, config.model.revision, with_weights=False)
    except UserError:
        return
    if (base / _GENERATION).is_file():
        shutil.copyfile(base / _GENERATION, folder / _GENERATION)
