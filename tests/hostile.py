"""Hostile input for the tests: damage done to valid files, and a watch over whoever reads them."""

import copy
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.helpers import ALL
from trainer.errors import UserError

SECONDS = 20
"""After so long a reader hangs."""
MEMORY = 4 * 2**30
"""So much more address space a reader may ask for."""


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def fuzz(usual: int = 100, many: int = 3000) -> settings:
    """The same examples in every run: `usual` of them, or with RANKCAST_ALL=1 `many`."""
    return settings(
        max_examples=many if ALL else usual,
        derandomize=True,
        database=None,
        deadline=None,  # `attempt` has one that stops a reader, too
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain, it traces every line
        suppress_health_check=list(HealthCheck),
    )


# --- damage

TOKENS = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b'"', b"'", b",", b":", b"{",
    b"}", b"[", b"]", b"[" * 3000, b'{"a":' * 3000, b"- " * 300, b"9" * 5000, b"0x" + b"f" * 5000,
    b"NaN", b"-Infinity", b"1e999", b"-1", b"null", b"true", b"&a ", b"*a", b"<<: ", b"? ", b"!!int ''",
    b"!!bool x", b"!!float x", b"!!timestamp x", b"!!set {a}", b"!!omap [a]", b"!!binary x", b"!!map [a]",
    b"!!python/object/apply:os.system [id]", b"\xe2\x80\xa8", b"\\ud800", b"../../x", b"/etc/passwd",
    b"\x1b[2J", b"{{ ''.__class__ }}", b"{question}", b"2001-99-99",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 2**31, 2**63, 2**200, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "auto", "none", "..", "../../x", "/etc/passwd", "/nowhere/" + "a" * 300, "a" * 5000, "\0", "\ud800",
    "\x1b[2J\n\u2028", [], [0], ["x"], [[]], {}, {"x": 1}, {"": None}, {"../x": {}},
]  # fmt: skip
for _depth in (30, 300):
    _nested: Any = []
    for _ in range(_depth):
        _nested = [_nested]
    VALUES.append(_nested)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with bytes flipped, cut out, repeated elsewhere, or put in; or quite another."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        match draw(st.sampled_from(["flip", "cut", "splice", "token", "truncate"])):
            case "flip" if start < len(data):
                data[start] ^= draw(st.integers(1, 255))
            case "cut":
                del data[start : min(stop, start + 40)]
            case "splice":
                data[start:start] = data[stop : stop + draw(st.integers(1, 80))]
            case "token":
                data[start:start] = draw(st.sampled_from(TOKENS))
            case "truncate" if draw(st.booleans()):
                del data[start:]
    return bytes(data)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    for key, inner in (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    ):  # fmt: skip
        yield (*path, key)
        yield from _places(inner, (*path, key))


@st.composite
def retyped(draw: st.DrawFn, value: Any) -> Any:
    """`value`, plain data, with some of its parts gone, renamed, or of another type."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(st.sampled_from(VALUES))
        *path, key = draw(st.sampled_from(places))
        owner = value
        for part in path:
            owner = owner[part]
        match draw(st.integers(0, 5)):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                name = draw(
                    st.sampled_from(["", "x", "..", "../../x", "/x", "a\nb", "\ud800", "a/b/c"])
                )
                owner[name] = owner.pop(key)
            case _:
                owner[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return value


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


def hostile_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: valid but of other content, or broken."""
    return st.one_of(retyped(value).map(json_bytes), damaged(json_bytes(value)))


# --- the watch

_watched: Path | None = None
_seen: list[str] = []
_EXECUTES = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class",
             "ctypes.dlopen", "socket.connect")  # fmt: skip


def _absolute(name: Any) -> str:
    return os.path.normpath(Path.cwd() / os.fsdecode(name))


def _audit(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event in _EXECUTES and arguments != (None,):  # dlopen(None): the program itself
        _seen.append(f"{event} {arguments}")
    elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        name = "" if isinstance(arguments[0], int) else _absolute(arguments[0])
        if name and "__pycache__" not in name and not name.startswith((str(_watched), "/dev/")):
            _seen.append(f"{event} {name}")
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.symlink", "shutil.rmtree"):
        if event == "os.remove" and arguments[1] != -1:  # within a tree whose root was seen
            return
        name = _absolute(arguments[0])
        if not name.startswith(str(_watched)):
            _seen.append(f"{event} {name}")


sys.addaudithook(_audit)


class Hangs(BaseException):
    """No Exception: a reader that turns all of those into UserError must not swallow it."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails where what runs in it takes too long or too much memory, executes anything, or writes
    outside `folder`."""
    global _watched

    def hangs(*_: Any) -> None:
        raise Hangs(f"not done after {SECONDS} s")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watched = folder.resolve()
    _seen.clear()
    try:
        yield
    finally:
        _watched = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not _seen, _seen


def attempt(folder: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns, or the UserError that it ends in: one line. Nothing else may happen."""
    with watched(folder):
        try:
            return read()
        except UserError as error:
            line = str(error)
            assert line and line.isprintable() and len(line) <= 5000, line
            return error
