"""What CONTRIBUTING.md shows, as files of a temporary package."""

import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def example(section: str) -> tuple[str, str]:
    """(the file, the registry's line) of a section of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    file, line = re.findall(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    return file, textwrap.dedent(line)


def write_module(folder: Path, package: str, module: str, text: str) -> None:
    """`package.module` below `folder`, which is on the path."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / f"{module}.py").write_text(text, encoding="utf-8")


def registered(line: str, package: str, moved_to: str, **names: Any) -> tuple[str, Any]:
    """(key, value) of a registry's line, whose module is in another package."""
    ((key, value),) = eval("{" + line.replace(package, moved_to) + "}", names).items()
    return key, value
