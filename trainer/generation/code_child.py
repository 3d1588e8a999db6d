"""Runs a program that a model wrote: limited in memory and file size, without network or processes.

    python -I code_child.py PROGRAM MEMORY_BYTES CPU_SECONDS

The first line of its input is a token, which it prints as its last line if the program ends by
itself. Imports nothing of the project. Limits protect from accidents: a program may still read, and
delete, whatever files its user may.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

_MIB = 2**20
# linux/audit.h, linux/seccomp.h, linux/filter.h, and the system calls by architecture
_NUMBERS = {
    # machine: (AUDIT_ARCH, socket, io_uring_setup, clone, clone3, others that start processes)
    "x86_64": (0xC000003E, 41, 425, 56, 435, (57, 58)),
    "aarch64": (0xC00000B7, 198, 425, 220, 435, ()),
}
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EACCES, _ENOSYS = 13, 38
_NR, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data
_CLONE_THREAD = 0x10000
_PR_SET_SECCOMP, _FILTER, _PR_SET_NO_NEW_PRIVS = 22, 2, 38


def forbid_network_and_processes() -> None:
    """By a seccomp filter, which nothing in this process can take off again: no sockets, no
    new processes (threads may be made). Raises OSError."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _NUMBERS:
        raise OSError(f"no filter of system calls for {sys.platform} on {machine}")
    arch, socket, io_uring, clone, clone3, others = _NUMBERS[machine]
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, 0x40000000),  # x32's numbers
        (_RETURN, 0, 0, _KILL),
    ]
    for number, error in (
        (socket, _EACCES), (io_uring, _EACCES), (clone3, _ENOSYS), *((n, _EACCES) for n in others),
    ):  # fmt: skip
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | error)]
    code += [
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, _ERRNO | _EACCES),
        (_RETURN, 0, 0, _ALLOW),
    ]
    filters = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    held = ctypes.create_string_buffer(filters)
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.c_char_p(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def main() -> None:
    program, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    token = sys.stdin.readline()
    text = Path(program).read_text(encoding="utf-8")
    out = os.dup(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MIB, _MIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    forbid_network_and_processes()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    exec(compile(text, "program", "exec"), {"__name__": "program"})
    os.write(out, token.encode())


if __name__ == "__main__":
    main()
