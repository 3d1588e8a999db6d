"""The Dockerfile's steps without Docker: in a clean Debian folder, as root.

    python -m tests.campaigns.image FOLDER [--arg TORCH_INDEX=…] [--bind PATH]… [--env NAME=VALUE]…

debootstrap makes the base image's Debian; then every ENV, ARG, WORKDIR, COPY, RUN and USER is done
in a chroot, in order. `--bind` mounts a folder of this machine at the same place, read-only, and
`--env` sets a variable of all steps (PIP_FIND_LINKS, PIP_CERT, …), for packages that lie on disk or
come from another index. The steps are those of the file: what it does not know is an error. Says
how long each step took and how much of the disk the image takes.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.helpers import ROOT

BASE = re.compile(r"debian:(\w+)-slim")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, argument), lines that go on joined, without comments."""
    kept = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(kept).replace("\\\n", " ").splitlines():
        word, _, argument = line.strip().partition(" ")
        yield word, " ".join(argument.split())


def substituted(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: variables.get(match[1], ""), text)


class Image:
    """A folder in which the instructions are carried out."""

    def __init__(self, root: Path, arguments: dict[str, str], extra: dict[str, str]):
        self.root, self.arguments = root, arguments
        self.variables = {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin", "HOME": "/root"}
        self.variables |= extra
        self.folder, self.user = "/", "0"

    def run(self, command: str) -> None:
        """RUN, by bash, as the user and in the folder that were set."""
        inner = f"cd {shlex.quote(self.folder)} && {command}"
        subprocess.run(
            [
                "chroot", f"--userspec={self.user}:{self.user}", str(self.root), "/usr/bin/env", "-i",
                *(f"{name}={value}" for name, value in self.variables.items()),
                "bash", "-o", "pipefail", "-c", inner,
            ],
            check=True,
        )  # fmt: skip

    def do(self, word: str, argument: str) -> None:
        """One instruction of the Dockerfile."""
        if word == "RUN":
            self.run(argument)
        elif word == "ENV":
            for item in shlex.split(argument):
                name, _, value = item.partition("=")
                self.variables[name] = substituted(value, self.variables)
        elif word == "ARG":
            name, _, value = argument.partition("=")
            self.variables[name] = self.arguments.get(name, value)
        elif word == "WORKDIR":
            self.folder = argument
            (self.root / argument.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = argument.split()
            for source in sources:
                self.copy(ROOT / source, self.root / self.folder.lstrip("/") / target)
        elif word == "USER":
            self.user = argument
        elif word not in ("SHELL", "ENTRYPOINT"):
            raise ValueError(f"Dockerfile: {word}; accepted: what tests/campaigns/image.py knows")

    def copy(self, source: Path, target: Path) -> None:
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "logs")
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)


def mounted(root: Path, place: str, stack: ExitStack, *, writable: bool = False) -> None:
    """A folder or file of this machine at the same place in the image, until the stack ends."""
    target = root / place.lstrip("/")
    if Path(place).is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    subprocess.run(["mount", "--bind", place, str(target)], check=True)
    stack.callback(subprocess.run, ["umount", "-l", str(target)], check=True)
    if not writable:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(target)], check=True)


@contextmanager
def timed() -> Iterator[None]:
    """Say how long it took, unless that was nothing."""
    begun = time.monotonic()
    yield
    if (seconds := time.monotonic() - begun) >= 1:
        print(f"   {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for option in ("--arg", "--bind", "--env"):
        parser.add_argument(option, action="append", default=[])
    options = parser.parse_args()
    arguments, extra = (dict(item.split("=", 1) for item in given)
                        for given in (options.arg, options.env))  # fmt: skip
    root = options.folder.absolute()
    steps = list(instructions((ROOT / "Dockerfile").read_text()))
    assert steps[0][0] == "FROM"
    (suite,) = BASE.findall(steps[0][1])
    if not (root / "etc/debian_version").exists():
        with timed():
            subprocess.run(["debootstrap", "--variant=minbase", suite, str(root)], check=True)
        if (root / "proc").is_mount():  # left by debootstrap
            subprocess.run(["umount", str(root / "proc")], check=True)
    image = Image(root, arguments, extra)
    with ExitStack() as stack:
        for place in ("/dev", "/proc"):
            mounted(root, place, stack, writable=True)
        for place in ("/etc/resolv.conf", *options.bind):
            mounted(root, place, stack)
        for word, argument in steps[1:]:
            print(f"== {word} {argument}", flush=True)
            with timed():
                image.do(word, argument)
    used = subprocess.run(["du", "-sxm", root], check=True, capture_output=True, text=True)
    print(f"done: {int(used.stdout.split()[0]) / 1000:.1f} GB in {root.name}")


if __name__ == "__main__":
    main()
