"""Processes of the program, forked from one that has loaded its libraries: a tenth of a second instead of ten.

``subprocess.Popen`` of the tests, and of what they start, is ``warm.Popen``: ``python -m runner…``, the scripts of
this folder and the workers of pytest-xdist get a process of their own, with arguments, environment, folder, streams,
session and signals as they would be, of which only the imports have happened before. Everything else, what a test
marked ``cold`` starts, and a process whose environment has something that libraries read when they are imported, is
started anew.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import inspect
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
MODULES = ("runner", "runner.worker", "runner.mirror")
WORKER_OF_XDIST = ["-u", "-c", "import sys;exec(eval(sys.stdin.readline()))"]
"""What execnet starts ``python`` with; whether it is a warm one, ``conftest`` decides."""
READ_WHEN_USED = (
    "RUNNER_", "MLFLOW_", "SLURM", "COVERAGE_", "COV_", "PYTEST_", "COMP_", "GIT_", "DO_NOT_TRACK", "COLUMNS", "LINES",
    "PATH", "NO_COLOR", "TERM", "OLDPWD", "PWD", "SHLVL", "_", "GLIBC_TUNABLES",
)  # fmt: skip
"""How variables begin that no library reads when it is imported."""
LONGEST_COMMAND = 4096
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a process ignores from its start where who started it does."""

_execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Start:
    """What distinguishes a new process from others; ``address``: where it is asked for."""

    address: str
    command: list[str]
    folder: str
    environment: dict[str, str]
    umask: int
    session: bool
    group: int | None
    blocked: list[int] = field(default_factory=list)
    ignored: list[int] = field(default_factory=list)


@dataclass
class Place:
    """Where the warm process listens, its session and group, and its environment before and after its imports."""

    address: str
    family: list[int]
    environments: list[dict[str, str]]


is_wanted = True
"""Whether processes of ours may be warm."""


def _find() -> Place | None:
    """Where the warm process is to be asked; None: there is none, and every process is started anew."""
    return None


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A process that is forked from the warm one where that makes no difference, else one that is started anew."""

    _line: socket.socket | None = None
    """Tells how the process ended: it is the warm one's child, not ours."""

    @property
    def is_warm(self) -> bool:
        return self._line is not None

    def _execute_child(self, *arguments: Any) -> None:
        asked = inspect.signature(_execute).bind(self, *arguments).arguments
        start = _start(asked)
        if start is None:
            _execute(self, *arguments)
            return
        streams = [(asked["p2cread"], 0), (asked["c2pwrite"], 1), (asked["errwrite"], 2)]
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(start.address)
        socket.send_fds(self._line, [b"+"], [own if given == -1 else given for given, own in streams])
        self._line.sendall(json.dumps(asdict(start)).encode() + b"\n")
        self.pid = int.from_bytes(_exactly(self._line, 4), "big")
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._line is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        if self._line.fileno() < 0:  # whoever waited was interrupted while the answer was read: it is lost
            return self.pid, 1 << 8
        if wait_flags & os.WNOHANG and not select.select([self._line], [], [], 0)[0]:
            return 0, 0
        with self._line:
            told = self._line.recv(4, socket.MSG_WAITALL)
        return self.pid, int.from_bytes(told, "big") if len(told) == 4 else 1 << 8

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self._line is None:
            return super()._internal_poll(_deadstate)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


@contextlib.contextmanager
def processes(environment: dict[str, str]) -> Iterator[None]:
    """While the block runs processes of ours may be warm; the one that they are forked from is started when the first
    asks for it, in this environment. A process that was forked from one forks from the same."""
    global _find
    nowhere = _find
    if nowhere():
        yield
        return
    with contextlib.ExitStack() as held:
        _find = functools.cache(lambda: held.enter_context(_server(environment)))
        try:
            yield
        finally:
            _find = nowhere


@contextlib.contextmanager
def _server(environment: dict[str, str]) -> Iterator[Place | None]:
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        address = f"{folder}/socket"
        program = f"import sys; sys.path.insert(0, {str(HERE)!r}); import warm; warm.serve({address!r})()"
        command = [sys.executable, "-c", program, " " * LONGEST_COMMAND]  # room for other words
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, cwd="/") as server:
            assert server.stdin
            assert server.stdout
            yield Place(address, _family(), [environment, json.loads(server.stdout.readline())])
            server.stdin.close()


def serve(address: str) -> Callable[[], Any]:
    """Fork a process for whoever asks, until the end of stdin; returns what is left to do, there and in each process.

    A process begins where this returns, with nothing of this one but what it has imported.
    """
    global _find
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, who end this
    path, before = sys.path[1:], dict(os.environ)
    if "" in path:
        path.remove("")  # of python -c
    subprocess.Popen = Popen  # type: ignore[misc]
    _load()
    database = _make_database(Path(address).parent)
    assert threads() <= {"jemalloc_bg_thd"}, threads()  # which knows how to be forked
    place = Place(address, _family(), [before, dict(os.environ)])
    _find = lambda: place  # noqa: E731
    set_by_imports = {name: value for name, value in os.environ.items() if name not in before}
    with socket.socket(socket.AF_UNIX) as server, _children() as (wakeup, lines):
        lines[database] = socket.socket(socket.AF_UNIX)  # nobody waits for it
        server.bind(address)
        server.listen(64)
        print(json.dumps(dict(os.environ)), flush=True)
        while True:
            ready, _, _ = select.select([server, wakeup, 0], [], [])
            if 0 in ready:
                return lambda: _end(0)
            if wakeup in ready:
                wakeup.recv(4096)
            if server in ready and (process := _forked(server, lines)):
                break
            _reap(lines)
    start, streams = process
    return lambda: _become(start, streams, path, set_by_imports)


def _start(asked: dict[str, Any]) -> Start | None:
    """What was asked of Popen, where a fork of the warm process can be that."""
    if not is_wanted or asked["shell"] or asked["preexec_fn"] or asked["pass_fds"] or not asked["close_fds"]:
        return None
    command = [os.fsdecode(word) for word in asked["args"]] if isinstance(asked["args"], list | tuple) else []
    environment = dict(os.environ) if asked["env"] is None else {**asked["env"]}
    if not _is_ours(command) or not (place := _find()) or _differs(environment, place):
        return None
    folder = os.path.abspath(asked["cwd"] or os.getcwd())
    os.umask(umask := os.umask(0))
    ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    group = None if asked["process_group"] == -1 else asked["process_group"]
    session = bool(asked["start_new_session"])
    if not session and place.family != _family():
        return None
    return Start(place.address, command, folder, environment, umask, session, group, blocked, ignored)


def _family() -> list[int]:
    return [os.getsid(0), os.getpgrp()]


def _is_ours(command: list[str]) -> bool:
    if len(command) < 2 or command[0] != sys.executable or len("\0".join(command)) >= LONGEST_COMMAND:
        return False
    words = command[2:] if command[1] == "-P" else command[1:]
    return (words[0] == "-m" and words[1] in MODULES) or words == WORKER_OF_XDIST or HERE in Path(words[0]).parents


def _differs(environment: dict[str, str], place: Place) -> bool:
    """Whether libraries would be imported otherwise than they were."""
    names = {name for each in (environment, *place.environments) for name in each}
    different = {name for name in names if environment.get(name) not in [each.get(name) for each in place.environments]}
    return bool(read_on_import(different))


def stop_coverage() -> list[Any]:
    """Stop what measures coverage in this process; returns what may be started again."""
    stopped: list[Any] = []
    while "coverage" in sys.modules and (current := sys.modules["coverage"].Coverage.current()):
        current.stop()
        stopped.insert(0, current)
    return stopped


def read_on_import(names: Iterable[str]) -> list[str]:
    """Which of these variables some library may read when it is imported."""
    return [name for name in names if not name.startswith(READ_WHEN_USED)]


def copy_databases(folder: Path) -> None:
    """Let MLflow make one database for this process and those forked from it: its migrations take seconds each time."""
    from runner.tracking.mlflow import store

    make, made = store._make, folder / "mlflow.db"

    def copied(database: Path) -> None:
        if not is_wanted:
            make(database)
            return
        if not made.exists():  # two that make it at the same time make two, of which the last one stays
            make(own := folder / f"{os.getpid()}.db")
            own.rename(made)
        aside = database.with_name(f".{database.name}.new")
        shutil.copy(made, aside)
        aside.rename(database)

    store._make = copied


def keep_conversations() -> None:
    """Let the bundled conversations be parsed once for this process and those forked from it: 40 MB of JSON."""
    from runner.data import sources

    read = sources._conversations
    if not hasattr(read, "cache_info"):
        sources._conversations = functools.cache(lambda file: tuple(read(file)))  # type: ignore[assignment]


def _exactly(line: socket.socket, length: int) -> bytes:
    found = line.recv(length, socket.MSG_WAITALL)
    assert len(found) == length, "the warm process is gone"
    return found


def threads() -> set[str]:
    """The names of the threads of this process besides the first, a library's too."""
    tasks = (task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid()))
    return {(task / "comm").read_text().strip() for task in tasks}


def _load() -> None:
    """All that commands, workers and mirrors import, as they would."""
    import logging
    import pkgutil

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package
    from runner.launch.local import launcher
    from runner.tracking.mlflow import store

    for name, value in store.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow.store.tracking.sqlalchemy_store
    import mlflow.tracking.client
    import torch

    assert mlflow
    launcher.load_libraries(with_adapters=True)
    import runner
    from runner.data import sources
    from runner.train import throughput

    for module in pkgutil.walk_packages(runner.__path__, "runner."):
        if module.name not in MODULES and module.name != "runner.__main__":
            __import__(module.name)
    keep_conversations()
    assert list(sources.chitchat().train)
    for seconds in (0.05, 0.2):  # measured once for all
        throughput._measured_flops(torch.device("cpu"), torch.float32, 1024, seconds=seconds)
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    for name in store.ENVIRONMENT:
        os.environ.pop(name)


def _make_database(folder: Path) -> int:
    """In a process of its own, whose number is returned: it takes seconds, and MLflow keeps what it opened."""
    from runner.tracking.mlflow import store

    copy_databases(folder)
    if not (pid := os.fork()):
        try:
            store.connect(f"sqlite:///{folder}/first.db")
        finally:
            os._exit(0)
    return pid


@contextlib.contextmanager
def _children() -> Iterator[tuple[socket.socket, dict[int, socket.socket]]]:
    """What can be read when a child has ended, and the lines of those who wait for one."""
    import gc

    wakeup, rings = socket.socketpair()
    for end in (wakeup, rings):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    before = signal.set_wakeup_fd(rings.fileno(), warn_on_full_buffer=False)
    lines: dict[int, socket.socket] = {}
    gc.collect()
    gc.freeze()  # what the collector touches would be copied
    try:
        yield wakeup, lines
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (wakeup, rings, *lines.values()):
            each.close()


def _forked(server: socket.socket, lines: dict[int, socket.socket]) -> tuple[Start, list[int]] | None:
    """In a new process what it is to be, and its streams; in this one None."""
    line, _ = server.accept()
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    with line.makefile("rb") as asked:
        start = Start(**json.loads(asked.readline()))
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        line.close()
        return start, streams
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for stream in streams:
        os.close(stream)
    lines[pid] = line
    with contextlib.suppress(OSError):
        line.sendall(pid.to_bytes(4, "big"))
    return None


def _reap(lines: dict[int, socket.socket]) -> None:
    for pid in list(lines):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError), lines.pop(pid) as line:
                line.sendall(status.to_bytes(4, "big"))


def _become(start: Start, streams: list[int], path: list[str], set_by_imports: dict[str, str]) -> NoReturn:
    """Do in this process, which was forked for it, what was asked for."""
    import numpy

    if start.session:
        os.setsid()
    elif start.group is not None:
        os.setpgid(0, start.group)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    os.chdir(start.folder)
    os.umask(start.umask)
    os.environ.clear()
    os.environ.update({**set_by_imports, **start.environment})
    if "COVERAGE_PROCESS_CONFIG" not in start.environment or start.command[1:] == WORKER_OF_XDIST:
        stop_coverage()  # pytest-cov measures a worker itself
    tempfile.tempdir = None
    numpy.random.seed()
    os.nice = lambda _: 0  # mirrors stand back, and a machine that is kept busy by tests would not come to them
    for number in (*PASSED_ON, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN if number in start.ignored else signal.SIG_DFL)
    if signal.SIGINT not in start.ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _rename(start.command)
    signal.pthread_sigmask(signal.SIG_SETMASK, start.blocked)
    try:
        _run(start.command, path)
    except SystemExit as error:
        _end(error.code)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        _end(1)
    _end(0)


def _end(code: Any) -> NoReturn:
    """As Python does, but for taking apart what was imported: half a second for nothing."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _rename(command: list[str]) -> None:
    """Let the system show this command line for this process."""
    words = "\0".join(command).encode() + b"\0"
    begin, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, words, len(words))


def _run(command: list[str], path: list[str]) -> None:
    """As ``python`` does with these words."""
    import runpy

    sys.orig_argv[:] = command
    is_safe = command[1] == "-P"
    words = command[2:] if is_safe else command[1:]
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package", module="runpy")
    if words == WORKER_OF_XDIST:
        sys.argv[:], sys.path[:] = ["-c"], ["", *path]
        exec(words[-1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv[:] = words[1:]
        sys.path[:] = path if is_safe else [os.getcwd(), *path]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = words
        sys.path[:] = [str(Path(words[0]).parent), *path]
        runpy.run_path(words[0], run_name="__main__")
