"""Write docs/configuration.md from the configuration's own types and docstrings.

python docs/make_configuration.py
"""

from pathlib import Path

from adapters.methods.registry import OPTIONS as METHOD_OPTIONS
from adapters.options import Section
from trainer.config.config import Config
from trainer.config.validation import type_name
from trainer.tasks.registry import OPTIONS as TASK_OPTIONS


def table(section: type[Section]) -> list[str]:
    return ["| key | type | default | |", "|---|---|---|---|", *rows(section)]


def rows(section: type[Section], prefix: str = "") -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        name = prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines += rows(field.annotation, f"{name}.")
            continue
        default = "required" if field.is_required() else f"`{field.get_default()!r}`"
        text = " ".join((field.description or "").split())
        cells = (f"`{name}`", type_name(field.annotation), default, text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def document() -> str:
    lines = ["# Configuration", "", "Made by `python docs/make_configuration.py`; do not edit.", ""]
    for name, field in Config.model_fields.items():
        kinds = {"method": METHOD_OPTIONS, "task": TASK_OPTIONS}.get(name)
        if kinds is None:
            assert isinstance(field.annotation, type)
            lines += [f"## {name}", "", *table(field.annotation), ""]
            continue
        for kind, section in kinds.items():
            lines += [f"## {name} (`kind: {kind}`)", "", *table(section), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(document(), encoding="utf-8")
