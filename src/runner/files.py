"""Files that several processes share: written whole, locked, watched; and the user's cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from runner.errors import ConfigError, Fault, RunnerError


def cache_dir(room: str) -> Path:
    """A folder of the user's cache (``RUNNER_CACHE`` moves it), made if need be; what lies there can be made again.

    Raises:
        ConfigError: it cannot be made.
    """
    base = os.environ.get("RUNNER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "runner")
    folder = Path(base).expanduser() / room
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set RUNNER_CACHE to a folder that can be written"
        raise ConfigError(Fault("", f"the cache folder {folder} cannot be made: {error.strerror}", remedy)) from error
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for, then hold, an advisory lock on ``path``; who holds it may remove the file, and then its folders."""
    while True:
        with _opened(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks: it does not say of which file
                error.filename = str(path)
                raise
            if _is_same(handle, path):  # else it was removed meanwhile, and others may hold a new one
                yield
                return


def _opened(path: Path) -> IO[str]:
    """The file, with its folders made anew where somebody removes them as we come."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # mkdir finds the folder, and then no folder
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def _is_same(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def is_held(lock: Path, *, shared: bool = False) -> bool:
    """Whether a process holds the advisory lock on this file; ``shared`` where holders share it among themselves.

    Looking holds the lock for an instant. Who takes it alone should therefore try more than once.
    """
    mode, probe = ("r+", fcntl.LOCK_EX) if shared else ("r", fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError, PermissionError), lock.open(mode) as handle:
        try:
            fcntl.flock(handle, probe | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def stamp(path: Path) -> tuple[int, ...]:
    """Differs after every ``write_atomic`` and every line that is added; empty where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


OF_A_FOLDER = {
    errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip
"""What the system says of a folder that cannot be made, written or locked; EIO it says of a lost terminal, too."""


@contextlib.contextmanager
def writing(folder: Path, refusal: type[RunnerError] = ConfigError) -> Iterator[None]:
    """Say in the user's words that there is no room in this folder, or no right to write, where the block finds it so.

    Raises:
        RunnerError: ``refusal``. What else the system refuses (a process, a pipe, a file elsewhere) stays as it is.
    """
    try:
        yield
    except OSError as error:
        if not is_of_outputs(error, folder):
            raise
        raise refusal(outputs_fault(error, folder)) from error


def is_of_outputs(error: OSError, folder: Path) -> bool:
    """Whether it is this folder, something below it or a folder above it that cannot be written."""
    if not isinstance(error.filename, str | os.PathLike):
        return error.errno in OF_A_DISK  # no other tells without a name whether it is about a file at all
    path, folder = Path(error.filename).absolute(), folder.absolute()
    is_there = path.is_relative_to(folder) or folder.is_relative_to(path)
    return is_there and error.errno in OF_A_DISK | OF_A_FOLDER


def outputs_fault(error: OSError, folder: Path) -> Fault:
    """What to say where a run folder cannot be written."""
    remedy = "make room there, or set outputs_dir to a folder that can be written"
    return Fault("outputs_dir", f"cannot be written: {error.strerror}", remedy, folder)
