"""Errors that a user can fix, and the exit codes of the process."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_USAGE = 2
"""The configuration, a file or the data is not valid; nothing was trained."""
EXIT_FAILED = 1
"""The run failed after it began; what was saved is intact."""
EXIT_REQUEUE = 75
"""The run was asked to stop, and saved: restart it to resume (EX_TEMPFAIL of sysexits.h)."""


_LONGEST = 1000  # characters of a message


_PASSWORD = re.compile(r"://[^/\s@]*@")
"""User and password in a URL."""


class UserError(ValueError):
    """One line naming the key or file, the value, and what is accepted.

    Values come from files: the message is made printable, truncated, and rid of passwords in URLs.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str):
        line = _PASSWORD.sub("://***@", " ".join(message.split()))
        if len(line) > _LONGEST:  # keep both ends: the key, and what is accepted
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def first_line(error: BaseException) -> str:
    """First line of another library's exception, with the second where the first ends in ":"."""
    first, *rest = str(error).strip().splitlines() or [repr(error)]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def reason(error: BaseException) -> str:
    """The system's words for an error, also where a library wraps them: "No space left …"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])) if number else first_line(error)


class RunFailed(UserError):
    """A run that began must abort; the message names what it can resume from."""

    exit_code = EXIT_FAILED


class Diverged(RunFailed):
    """A run that left nothing of use at its last step, or whose steps are not finite any more."""


class BadCheckpoint(UserError):
    """A checkpoint that cannot be used; the message gives the reason."""


class DamagedCheckpoint(BadCheckpoint):
    """A checkpoint whose files are not those that were written: an older one can take its place."""


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason."""


@contextmanager
def refuse_mismatch(source: Path) -> Iterator[None]:
    """Raise BadCheckpoint for any error that mismatched tensors or values of `source` cause."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # e.g. a method's load_state_dict, which trusts its input
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BadCheckpoint(f"{source}: does not match this configuration ({reason})") from error
