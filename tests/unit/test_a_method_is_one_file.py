"""CONTRIBUTING's example of a method is one file and one line: it trains, is told apart, replayed,
watched and drawn."""

import io
import json
import re
import sys

import pytest
from rich.console import Console

from adapters.methods.registry import METHODS, OPTIONS
from tests.helpers import ROOT, losses, quick_config
from trainer.distributed.world import World
from trainer.errors import UserError
from trainer.report import watch
from trainer.report.report import report
from trainer.run.run import run


def example() -> tuple[str, str, str]:
    """(the file, the name and the class in the registry's line) as CONTRIBUTING has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A method")[1].split("\n## ")[0]
    (file,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ((name, line),) = re.findall(r'`"(\w+)": "([\w.]+:\w+)",`', section)
    return file, name, line


@pytest.fixture
def turns(tmp_path, monkeypatch) -> str:
    """The example in a package of its own, and its line in the registry."""
    file, name, line = example()
    package = tmp_path / "somebodys_methods"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / f"{name}.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, name, f"{package.name}.{name}:{line.partition(':')[2]}")
    yield name
    for module in [module for module in sys.modules if module.startswith(package.name)]:
        del sys.modules[module]


def recorded(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "allocation.jsonl").open()]


def test_a_method_is_one_file_and_one_line(tmp_path, turns):
    assert turns in METHODS and OPTIONS[turns] is METHODS[turns].Options
    config = quick_config(tmp_path, f"method.kind={turns}", "run.steps=8", "run.name=first")
    run(config, World())
    decided = recorded(config.run_folder)
    assert [line["step"] for line in decided] == list(range(8))

    chosen = [line["first"] for line in decided]
    assert len(set(chosen)) > 2, "nothing to tell apart"
    digests = dict(zip(chosen, (line["digest"] for line in decided), strict=True))
    assert [digests[first] for first in chosen] == [line["digest"] for line in decided]
    assert len(set(digests.values())) == len(set(chosen))

    console = Console(width=100, file=io.StringIO())
    console.print(watch.view(config.run_folder))
    shown = console.file.getvalue()
    assert re.search(rf"first +{chosen[-1]} ", shown) and "before step 7" in shown

    drawn = {file.stem: file for file in report([config.run_folder])}
    assert drawn[turns].stat().st_size > 1000
    assert "First component at work" in drawn[turns].with_suffix(".svg").read_text()


def test_its_own_decisions_are_replayed(tmp_path, turns):
    short = f"method.kind={turns}", "run.steps=4"
    first = quick_config(tmp_path, *short, "run.name=first")
    run(first, World())
    same, own, followed = (
        quick_config(tmp_path, *short, f"run.name={name}", *more)
        for name, *more in (
            ("same", f"method.replay={first.run_folder}"),
            ("own", "run.seed=1"),
            ("followed", "run.seed=1", f"method.replay={first.run_folder}"),
        )
    )
    for config in (same, own, followed):
        run(config, World())
    assert recorded(same.run_folder) == recorded(first.run_folder)
    assert losses(same.run_folder) == losses(first.run_folder)
    assert recorded(own.run_folder) != recorded(first.run_folder)
    assert recorded(followed.run_folder) == recorded(first.run_folder)

    file = first.run_folder / "allocation.jsonl"
    line = recorded(first.run_folder)[0]
    damaged = json.dumps({**line, "first": (line["first"] + 1) % 8})
    file.write_text(damaged + "\n" + "".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="step 0: damaged, its digest differs"):
        run(quick_config(tmp_path, *short, f"method.replay={file}", "run.name=no"), World())
