"""The documentation: short, linked, and true to the tree, the commands and the configuration."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from adapters.methods.registry import METHODS
from adapters.options import Section
from docs import make_results as results
from trainer.config.config import Config
from trainer.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GENERATED = ROOT / "docs/configuration.md"
PAGES = [
    README, ROOT / "CONTRIBUTING.md", ROOT / "launch/slurm/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
"""All but CHANGELOG.md, which also names what is gone."""

PATH = re.compile(
    r"(?<![\w./-])(?:(?:adapters|trainer|launch|tests|benchmarks|configs|docs)/[\w./*-]*\w"
    r"\.(?:py|yaml|json|md|png|sh|sbatch))"
)
KEY = re.compile(
    r"(?<![\w./-])(?:run|model|task|data|method|optim|generation|engine|log|checkpoint)(?:\.[a-z_0-9]+)+"
)
FILES = ("py", "yaml", "gguf", "json", "jsonl", "md", "sh")
"""Endings by which a word is a file and no key."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_lines(page: Path) -> Iterator[str]:
    """Lines of the fenced blocks that hold commands."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.S | re.M):
        if not language:
            yield from block.splitlines()


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def keys(section: type[Section], prefix: str) -> Iterator[str]:
    yield prefix
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from keys(kind, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


def known_keys() -> set[str]:
    found: set[str] = set()
    for name, field in Config.model_fields.items():
        kinds = {"method": METHODS, "task": TASKS}.get(name)
        sections = [k.Options for k in kinds.values()] if kinds else [field.annotation]
        for section in sections:
            assert isinstance(section, type)
            found.update(keys(section, name))
    return found


def test_the_readme_is_short():
    assert len(text_of(README).split()) <= 1000


def test_the_readme_names_the_two_commands_of_a_newcomer():
    assert {"make quickstart", "make test"} <= {
        line.split("#")[0].strip() for line in code_lines(README)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{target}: no such file"
        assert not anchor or anchor in slugs(linked), f"{target}: no such heading"


def test_the_index_lists_every_page():
    index = text_of(ROOT / "docs/README.md")
    missing = [
        page.name
        for page in (ROOT / "docs").glob("*.md")
        if page.name != "README.md" and f"]({page.name})" not in index
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = sorted(set(PATH.findall(text_of(page))))
    assert [path for path in named if not list(ROOT.glob(path))] == []


def test_the_tour_of_the_code_names_files():
    """A bare name, as in "`adapters/methods/base.py`, `dylora.py`", lies in the last folder named."""
    for line in re.findall(r"^\d+\. (.*)$", text_of(README), re.M):
        folder = ROOT
        for name in re.findall(r"`([\w/.]+\.py)`", line):
            folder = (ROOT / name).parent if "/" in name else folder
            assert (folder / Path(name).name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_that_are_named_exist(page):
    text = text_of(page)
    makefile = text_of(ROOT / "Makefile")
    for command in re.findall(r"(?:`|^)rankcast ([a-z-]+)", text, re.M):
        assert (ROOT / f"launch/{command}.py").is_file(), f"rankcast {command}"
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    for module in re.findall(r"-m ((?:benchmarks|tests)[\w.]+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or path.is_dir(), f"-m {module}"
    for script in re.findall(r"[\w/]*launch/(?:slurm/)?\w+\.(?:py|sbatch)", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p != GENERATED], ids=lambda p: str(p.relative_to(ROOT))
)
def test_keys_that_are_named_exist(page):
    known = known_keys()
    # What an architecture was refused with names modules, such as model.layers.0.
    text = re.sub(
        r"<!-- architectures: begin -->.*<!-- architectures: end -->", "", text_of(page), flags=re.S
    )
    named = {key for key in KEY.findall(text) if key.rpartition(".")[2] not in FILES}
    named = {key for key in named if not key.startswith("model.overrides.")}
    assert sorted(named - known) == []


def test_the_configuration_that_the_readme_explains_is_the_shipped_one():
    _, block = re.findall(r"^```yaml\n(.*?)^```", text_of(README), re.S | re.M)
    explained = yaml.safe_load(block)
    shipped = yaml.safe_load(text_of(ROOT / "configs/gsm8k_lora.yaml"))
    for section, values in explained.items():
        for key, value in values.items():
            assert shipped[section][key] == value, f"{section}.{key}"


@pytest.mark.parametrize("page", [README, ROOT / "docs/methods.md"], ids=["README", "methods"])
def test_every_method_is_documented(page):
    text = text_of(page)
    assert [kind for kind in METHODS if f"`{kind}`" not in text] == []


def test_the_tables_of_results_are_those_of_the_kept_results():
    page = results.PAGE.read_text(encoding="utf-8")
    assert results.filled(page, results.TABLES) == page, "run python docs/make_results.py"


def test_tables_replace_what_was_between_their_marks(tmp_path):
    head = "| arm |\n|---|\n"
    (tmp_path / "a.md").write_text(f"{head}| new |\n")
    page = "x\n<!-- table: a.md -->\n| old |\n<!-- end -->\ny\n<!-- end -->\n"
    once = results.filled(page, tmp_path)
    expected = f"x\n<!-- table: a.md -->\n\n{head}| new |\n\n<!-- end -->\ny\n<!-- end -->\n"
    assert once == results.filled(once, tmp_path) == expected
    assert f"\n\n{results.NONE}\n\n" in results.filled(page, tmp_path / "none")
    (tmp_path / "a.md").write_text(f"{head}\nScore: none so far.\n")
    assert f"\n\n{results.NONE}\n\n" in results.filled(page, tmp_path)


def test_tables_are_remade_of_what_is_kept_tasks_together_by_variant(tmp_path):
    names = "smollm2_rte", "smollm2_arc_easy", "smollm2_matrices", "stories_matrices"
    for name in (*names, "smollm2_rte-nf4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl.xz").touch()
    (tmp_path / "smollm2_cola").mkdir()
    expected = [
        ("", ["smollm2_arc_easy", "smollm2_rte"]),
        ("", ["smollm2_matrices"]),
        ("", ["stories_matrices"]),
        ("nf4", ["smollm2_rte"]),
    ]
    assert list(results.comparisons(tmp_path)) == expected
