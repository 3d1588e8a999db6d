"""The package as others install it: a wheel whose command works in another folder."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.campaigns.users_path import FILES, MODEL, QUESTION, STEPS, records
from tests.helpers import ROOT, TINY, environment, quick_config
from trainer import __version__

SOURCES = ("adapters", "trainer", "launch", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The wheel of these sources, unpacked. Made of a copy: a build writes beside what it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        here = ROOT / name
        copy = shutil.copytree if here.is_dir() else shutil.copy
        copy(here, source / name)
    wheels = tmp_path_factory.mktemp("wheels")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
            "--no-index", "--wheel-dir", str(wheels), str(source),
        ],
        check=True, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name == f"rankcast-{__version__}-py3-none-any.whl"
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_all_that_is_installed_for_it_is_pinned():
    """constraints.txt holds whatever the package and the extra dev need, as far as it is here."""
    pins = {
        canonicalize_name(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    left = [*project["dependencies"], *extras["dev"], *extras["docs"], *extras["trackers"]]
    needed: set[tuple[str, str]] = set()
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name == "rankcast" or (name, extra) in needed:
                continue
            needed.add((name, extra))
            with suppress(PackageNotFoundError):
                for given in map(Requirement, requires(name) or []):
                    if given.marker is None or given.marker.evaluate({"extra": extra}):
                        given.marker = None
                        left.append(str(given))
    assert not sorted({name for name, _ in needed} - pins)


def command(unpacked: Path, elsewhere: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`rankcast ARGUMENTS` with the wheel's packages, in another folder."""
    return subprocess.run(
        [sys.executable, "-m", "launch.main", *arguments],
        cwd=elsewhere, env=environment() | {"PYTHONPATH": str(unpacked)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_it_holds_every_module_and_nothing_else(unpacked):
    expected = {
        path.relative_to(ROOT)
        for package in ("adapters", "trainer", "launch")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == expected
    assert (unpacked / "adapters/py.typed").is_file() and (unpacked / "trainer/py.typed").is_file()
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "rankcast = launch.main:main" in entry_points.read_text()


def test_its_command_works_in_another_folder(unpacked, tmp_path):
    done = command(unpacked, tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"rankcast {__version__}\n"), done
    model, data = (str(ROOT / "configs/quickstart" / name) for name in ("model", "train.jsonl"))
    config = quick_config(
        tmp_path, f"model.id={model}", f"data.train={data}", "data.eval=null", "run.name=there"
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    done = command(unpacked, tmp_path, "train", "--config", str(file), "--dry-run")
    assert done.returncode == 0 and "trainable " in done.stdout, done
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("arguments", "line"), [
    (["trian"], "error: command: 'trian' given; accepted: train, evaluate, "),
    ([], "error: the following arguments are required: command"),
    (["watch", "/nowhere"], "error: /nowhere: no heartbeat.json of a run"),
    (["estimate", "/nowhere.yaml"], "error: --config /nowhere.yaml: No such file"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, arguments, line):
    done = command(ROOT, tmp_path, *arguments)
    (told,) = done.stderr.splitlines()
    assert done.returncode == 2 and told.startswith(line)


def test_every_command_has_its_own_help(tmp_path):
    done = command(ROOT, tmp_path, "train", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: rankcast train ")


ONE_PROCESS = """
import io, runpy, shlex, sys
from launch.main import main

for command in sys.argv[1:]:
    words = shlex.split(command)
    if "|" in words:
        sys.stdin = io.StringIO(words[1] + "\\n")
        words = words[words.index("|") + 1 :]
    if words[0] == "python":
        runpy.run_path(words[1], run_name="__main__")
    else:
        assert main(words[1:]) == 0
    print("\\0")
"""


def test_a_short_users_path(unpacked, tmp_path):
    """The commands and programs of docs/getting-started.md with the quickstart's model, one after
    the other in one process; make test-all walks it as a user does. The programs compare PEFT,
    transformers and llama.cpp (where it is)."""
    shutil.copytree(TINY, tmp_path / MODEL)
    turn = "{{ m.role[0] + ': ' + m.content + (eos_token if m.role == 'assistant' else '') }}"
    template = "{% for m in messages %}" + turn + "{% endfor %}"
    (tmp_path / MODEL / "chat_template.jinja").write_text(template)
    short = FILES["pirate.yaml"].replace("steps: 24", "steps: 2")
    short = short.replace("max_length: 64", "max_length: 128, cache: cache")
    for name, text in {**FILES, "pirate.yaml": short, "chats.jsonl": records()}.items():
        (tmp_path / name).write_text(text)
    commands = [
        step.command
        for step in STEPS
        if step.command.split()[0] in ("rankcast", "python", "echo")
        and (not step.needs or importlib.util.find_spec(step.needs))
    ]
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS, *commands],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": str(unpacked)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = dict(zip(commands, done.stdout.split("\0\n")))
    (loaded,) = (text for command, text in said.items() if "load.py" in command)
    by_peft, _, _ = loaded.removeprefix("PEFT:     ").partition("\npipeline: ")
    asked = [text for command, text in said.items() if QUESTION in command]
    assert len(asked) == 2 and all(text.startswith(by_peft) for text in asked) and by_peft
