"""Failures that a user can mend, and the exit codes they end in."""

EXIT_USAGE = 2
"""The configuration, a file or the data is not usable; nothing was trained."""
EXIT_FAILED = 1
"""The run began and could not go on; what was saved is intact."""
EXIT_REQUEUE = 75
"""The run was asked to stop and saved: started again it goes on (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """One line naming the key or file, the value, and what is accepted."""

    exit_code = EXIT_USAGE


class RunFailed(UserError):
    """A run that began has to stop; the line names what is left to resume from."""

    exit_code = EXIT_FAILED
