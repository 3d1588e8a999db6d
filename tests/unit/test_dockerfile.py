"""The Dockerfile: linted, and what it copies is there. `make image` carries out its steps."""

import shutil
import subprocess
from fnmatch import fnmatch

import pytest

from tests.campaigns.image import instructions
from tests.helpers import ROOT

FILE = ROOT / "Dockerfile"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint: the extra [dev]")
def test_it_is_clean():
    found = subprocess.run(["hadolint", "--no-color", FILE], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_what_it_copies_is_there_and_sent_to_the_builder():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = [
        source
        for word, argument in instructions(FILE.read_text())
        if word == "COPY"
        for source in argument.split()[:-1]
    ]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / source).exists() for source in copied)


def test_it_holds_what_the_package_is_made_of():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = FILE.read_text()
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    for package in ("adapters", "trainer", "launch"):
        assert any(fnmatch(package, pattern) for pattern in packages)
        assert f"COPY {package} {package}" in copied
