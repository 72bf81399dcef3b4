"""Files shared by several processes: atomic writes, advisory locks, change detection; and the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from runner.errors import ConfigError, DamagedError, Fault, RunnerError

log = logging.getLogger("runner")
WRITERS = 8
"""Files or folders that are written at the same time."""


def user_path(text: str | Path, key: str = "") -> Path:
    """The path with the home folder in the place of ``~``; ``key``: the config key to name in an error.

    Raises:
        ConfigError: ``~NAME`` is not a user of this machine.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        problem = f"{text} begins with the home folder of a user that this machine does not have"
        raise ConfigError(Fault(key, problem, "write the whole path, without ~", text)) from error


def cache_dir(room: str) -> Path:
    """Create and return the folder ``room`` of the user's cache (``RUNNER_CACHE``, else ``~/.cache/runner``).

    Raises:
        ConfigError: the folder cannot be created.
    """
    base = os.environ.get("RUNNER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "runner")
    folder = user_path(base, "RUNNER_CACHE") / room
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "set the environment variable RUNNER_CACHE to a folder that can be written"
        raise ConfigError(Fault("", f"cannot create the cache folder {folder}: {error.strerror}", remedy)) from error
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the advisory lock on ``path`` while the block runs; the holder may remove the file and its folders."""
    while True:
        with _opened(path) as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks; flock's error has no file name
                error.filename = str(path)
                raise
            if _is_same(handle, path):  # else the file was removed meanwhile: lock the new one
                yield
                return


def _opened(path: Path) -> IO[str]:
    """Open the file for appending, and create its folders; retried if another process removes them meanwhile."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # FileExistsError: it vanished within mkdir
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a")


def _is_same(handle: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_atomic(path: Path, content: str | bytes, *, is_durable: bool = True) -> None:
    """Write a file atomically: after a crash, and for every reader, it has the old content or the new, never a part.

    Args:
        is_durable: also after a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            if is_durable:
                os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def at_once(tasks: Iterable[Callable[[], object]]) -> None:
    """Call all tasks, some at the same time: each waits for the disk again and again.

    Raises:
        BaseException: of the first task that fails; the tasks that have not begun are left out, no task is running.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(WRITERS, "writer")
    try:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Write a folder atomically: yields a temporary folder, which replaces ``folder`` unless the block raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    temporary, old = (folder.with_name(f".{folder.name}.{mark}{suffix}") for suffix in ("", ".old"))
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DamagedError: the file is empty, cut off, edited or unreadable; contains ``remedy``.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        problem = "is damaged: it is not a JSON object"
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # one of its folders is a file
        raise FileNotFoundError(str(path)) from error
    except OSError as error:
        problem, remedy = f"cannot be read: {error.strerror}", "ask its owner for permission to read it"
    except ValueError as error:
        problem = f"is damaged: it is {'cut off or edited' if path.stat().st_size else 'empty'} ({error})"
    raise DamagedError(Fault("", f"{path} {problem}", remedy))


def copy_of(path: Path) -> Path:
    """The hidden copy of a file written by ``write_kept``."""
    return path.with_name(f".{path.name}")


def write_kept(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object that cannot be computed again, after a hidden copy, which is thus never older."""
    text = json.dumps(content, indent=1, default=str)
    write_atomic(copy_of(path), text, is_durable=False)
    write_atomic(path, text)


def read_kept(path: Path, remedy: str, lock: Path | None = None) -> dict[str, Any]:
    """The JSON object in a file of ``write_kept``, or in its copy if the file is lost or damaged.

    Args:
        lock: lock of the writers; a damaged file is then restored from the copy. None: the caller holds it and writes.

    Raises:
        DamagedError, FileNotFoundError: as ``read_json``; the copy is lost or damaged, too.
    """
    try:
        return read_json(path, remedy)
    except (FileNotFoundError, DamagedError) as error:
        with contextlib.suppress(FileNotFoundError, DamagedError):
            content = read_json(copy_of(path), remedy)
            if lock and isinstance(error, DamagedError):
                log.warning(f"{error.faults[0].problem}; its copy is used: {copy_of(path)}")
                with contextlib.suppress(OSError), locked(lock):  # a folder that cannot be written
                    write_atomic(path, copy_of(path).read_bytes())
            return content
        raise


def restore_lost(path: Path, lock: Path) -> None:
    """Write a lost file of ``write_kept`` again from its copy, with a warning; ``lock``: lock of the writers."""
    if path.exists() or not copy_of(path).exists():
        return
    with locked(lock):
        if not path.exists():  # else another process has just created it
            log.warning(f"{path} is lost; restored from its copy: {copy_of(path)}")
            write_atomic(path, copy_of(path).read_bytes())


def is_held(lock: Path, *, shared: bool = False) -> bool:
    """Whether a process holds the advisory lock on this file; ``shared``: the holders use a shared lock (LOCK_SH).

    The check itself holds the lock for an instant, so a non-blocking attempt to acquire it should be repeated.
    """
    mode, probe = ("r+", fcntl.LOCK_EX) if shared else ("r", fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError, PermissionError), lock.open(mode) as handle:
        try:
            fcntl.flock(handle, probe | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def stamp(path: Path) -> tuple[int, ...]:
    """(inode, mtime in ns, size): changes with every ``write_atomic`` or appended line; () if there is no file."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
OF_A_FOLDER = {
    errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip
"""Error numbers for a folder that cannot be created, written or locked; a lost terminal is EIO as well."""


@contextlib.contextmanager
def writing(folder: Path, refusal: type[RunnerError] = ConfigError) -> Iterator[None]:
    """Turn an OSError of the block into a ``refusal`` if its cause is that ``folder`` cannot be written.

    Raises:
        RunnerError: ``refusal``. Any other OSError (of a process, a pipe, a file elsewhere) is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if not is_of_outputs(error, folder):
            raise
        raise refusal(outputs_fault(error, folder)) from error


def is_of_outputs(error: OSError, folder: Path) -> bool:
    """Whether the error means that this folder, a path below it or a folder above it cannot be written."""
    if not isinstance(error.filename, str | os.PathLike):
        return error.errno in OF_A_DISK  # without a file name, any other number may concern something else
    path, folder = Path(error.filename).absolute(), folder.absolute()
    is_related = path.is_relative_to(folder) or folder.is_relative_to(path)
    return is_related and error.errno in OF_A_DISK | OF_A_FOLDER


def outputs_fault(error: OSError, folder: Path) -> Fault:
    """The error message for a run folder that cannot be written."""
    remedy = "set outputs_dir to a folder that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free disk space there, or set outputs_dir to a folder on another disk"
    elif error.errno == errno.ENAMETOOLONG:
        remedy = "use a shorter name (sweep=NAME), or set outputs_dir to a shorter path"
    return Fault("outputs_dir", f"cannot be written: {error.strerror}", remedy, folder)
