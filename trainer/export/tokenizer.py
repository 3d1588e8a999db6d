"""The tokenizer of an export, with the chat template that the run was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.config import Config
from trainer.data.templates import Templates
from trainer.errors import UserError
from trainer.model.hub import load_tokenizer


def save_tokenizer(tokenizer: Any, template: Templates | None, folder: Path) -> None:
    """`template`: the one that `data.chat_template` set, as `set_template` gives it; None: the
    tokenizer's own."""
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = own if template is None else template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def save_set_template(config: Config, state: Mapping[str, Any], folder: Path) -> None:
    """Beside a checkpoint's adapter: tokenizer and chat template, if the run set one. Where the
    tokenizer is no longer available, the template alone."""
    template = state.get("chat_template")
    if template is None:
        return
    try:
        save_tokenizer(load_tokenizer(config.model), template, folder)
    except UserError:
        for name, text in ({"": template} if isinstance(template, str) else template).items():
            suffix = f"_{name}" if name not in ("", "default") else ""
            (folder / f"chat_template{suffix}.jinja").write_text(text, encoding="utf-8")
