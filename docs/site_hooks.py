"""What mkdocs.yml needs to show files outside docs/: pages, and links as GitHub follows them.

A page's links are paths of the repository, relative to the file that it is written in. Those to a
page lead to that page; those to any other file lead to a copy of it under `files/`.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "launch/slurm/README.md": "slurm.md",
}
"""Pages of the site that are not in docs/, by their place in the repository."""

API = """# Python API reference

What a method, an engine and a task are written against ([how](contributing.md)), from the source.

"""
CLASSES = [
    "adapters.methods.base.Method",
    "adapters.decision.Decision",
    "adapters.gated.GatedAdapter",
    "trainer.engine.base.Engine",
    "trainer.tasks.base.Task",
    "trainer.distributed.world.World",
]
"""In the generated page `api.md`."""

LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """The pages from elsewhere, the reference, and copies of the files that pages link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    reference = API + "\n\n".join(f"::: {name}" for name in CLASSES) + "\n"
    files.append(File.generated(config, "api.md", content=reference))
    linked = set()
    for file in files.documentation_pages():
        for _, target, _ in LINK.findall(file.content_string):
            linked.add(_place(file.src_uri, target))
    for path in sorted(linked):
        if path not in PAGES and not path.startswith("docs/") and (ROOT / path).is_file():
            place = f"files/{path}"
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links and pictures, outside of code, by their places in the site."""
    here = page.file.src_uri
    if here == "api.md":
        return markdown

    def moved(match: re.Match) -> str:
        before, target, after = match.groups()
        place = _place(here, target)
        found = PAGES.get(place) or (
            place.removeprefix("docs/") if place.startswith("docs/") else f"files/{place}"
        )
        return before + os.path.relpath(found, Path(here).parent) + after

    parts = FENCE.split(markdown)
    return "".join(part if index % 2 else LINK.sub(moved, part) for index, part in enumerate(parts))


def _place(page: str, target: str) -> str:
    """A link's target as a path of the repository."""
    source = next((s for s, p in PAGES.items() if p == page), f"docs/{page}")
    return os.path.normpath(Path(source).parent / target)
