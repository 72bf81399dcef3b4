"""The process in which one answer is tested, started as a script by ``code_tests``: limits first, then the code.

It reads a line ``SECONDS BYTES TOKEN`` and the code, and writes the token if the code ends without an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
OWN_USER, OWN_PROCESSES, OWN_NETWORK = 0x10000000, 0x20000000, 0x40000000  # flags of unshare(2)
FILE_BYTES, OPEN_FILES = 16 * 2**20, 64


def main() -> None:
    """Test the code of the standard input."""
    seconds, memory, token = sys.stdin.readline().split()
    source = sys.stdin.read()
    answer, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    isolate()
    limit(int(seconds), int(memory))
    exec(compile(source, "answer", "exec"), {"__name__": "__main__"})
    os.write(answer, token.encode())


def isolate() -> None:
    """Leave the network and the other processes behind, where the system lets a process do so: on most Linux machines.

    The rest runs in a child, the first of its own process space: all processes there end with it.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    apart = OWN_PROCESSES | OWN_NETWORK
    if libc.unshare(OWN_USER | apart) and libc.unshare(apart):
        return
    if child := os.fork():
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)


def limit(seconds: int, memory: int) -> None:
    """Limit CPU time, memory, sizes of files, open files and new processes (the last one not for root)."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        with contextlib.suppress(OSError, ValueError):  # a lower limit holds already, or the system has no such limit
            resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
