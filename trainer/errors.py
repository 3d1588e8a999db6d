"""Failures that a user can mend, and the exit codes they end in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_USAGE = 2
"""The configuration, a file or the data is not usable; nothing was trained."""
EXIT_FAILED = 1
"""The run began and could not go on; what was saved is intact."""
EXIT_REQUEUE = 75
"""The run was asked to stop and saved: started again it goes on (EX_TEMPFAIL of sysexits.h)."""


_LONGEST = 1000  # characters of a message


class UserError(ValueError):
    """One line naming the key or file, the value, and what is accepted.

    Values come from files, so whatever they hold is made printable and short here.
    """

    exit_code = EXIT_USAGE

    def __init__(self, message: str):
        line = " ".join(message.split())
        if len(line) > _LONGEST:  # the key stands first, what is accepted last
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def first_line(error: BaseException) -> str:
    """What another library's exception says, without the rest of its lines, unless the first one
    only announces the second."""
    first, *rest = str(error).strip().splitlines() or [repr(error)]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


class RunFailed(UserError):
    """A run that began has to stop; the line names what is left to resume from."""

    exit_code = EXIT_FAILED


class BadCheckpoint(UserError):
    """A checkpoint that cannot be used; the message says why."""


@contextmanager
def refuse_mismatch(source: Path) -> Iterator[None]:
    """Turns whatever wrong tensors or values lead to into BadCheckpoint."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a method's own state, say, is read by code that trusts it
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BadCheckpoint(
            f"{source}: not what a run of this configuration writes ({reason})"
        ) from error
