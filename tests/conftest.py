"""Shared fixtures. Everything runs offline; models are real but tiny unless a test says otherwise."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml

from runner.tracking.rundir import RunDir

pytest.register_assert_rewrite("fixtures")
pytest_plugins = ["fixtures.shared"]
TESTS = Path(__file__).parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that spin while they wait are in the way of tests beside them
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes are started: each would compile torch anew
if str(TESTS) not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):  # as it is in a worker of xdist
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), *paths)))
"""Processes that tests start may import conftest, fixtures, gate and warm, as tests do."""
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")  # the same dtype and numbers on every CPU: no AMX
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
subprocess.Popen = warm.Popen  # type: ignore[misc]
ENVIRONMENT = dict(os.environ)
"""As no test has changed it."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``--dist loadgroup``: a file stays in one process, with what its tests share; so does all that needs Slurm,
    and all that needs one of ``SHARED``. A slow test that shares nothing with its file goes where there is room.

    Slurm comes first: it is the longest, and waits for its jobs while the other processes do the rest; then what must
    stay together, the most slow tests first, so that none of it is left to one process at the end.
    """
    groups = {item: _group(item) for item in items}
    slow = Counter(groups[item] for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (groups[item] != "slurm", not groups[item], -slow[groups[item]]))
    for item, group in groups.items():
        if group:
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str:
    """The name of what runs in one process with this test; nothing where it needs none beside it."""
    if item.get_closest_marker("slurm"):
        return "slurm"
    names = getattr(item, "fixturenames", ())
    if shared := [SHARED[name] for name in SHARED if name in names]:
        return shared[0]
    fixtures = (each for name in names for each in item._fixtureinfo.name2fixturedefs.get(name, ()))  # type: ignore[attr-defined]
    is_alone = item.get_closest_marker("slow") and all(each.scope != "module" for each in fixtures)
    return "" if is_alone else item.path.stem


SHARED = {"place": "place", "real": "mlflow", "server": "mlflow"}
"""Fixture of fixtures/shared.py → the group of the tests of all files that need it: one process makes it."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker more than there are cores: tests wait for processes, for servers and for Slurm."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With older libraries, a test of what these cannot do ends at a refusal that names the version: it is skipped."""
    report = yield
    if report.failed and call.excinfo is not None:
        from fixtures import versions

        if reason := versions.refused(report, call.excinfo.value):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


WARM = pytest.StashKey[contextlib.ExitStack]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Fork the workers from a process that has imported the libraries, once for all."""
    config.stash[WARM] = contextlib.ExitStack()
    config.stash[WARM].enter_context(warm.processes(ENVIRONMENT))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash.get(WARM, contextlib.ExitStack()).close()


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what ``-m`` leaves out; every process of xdist leaves out the same."""
    if items:
        items[0].config.stash[LEFT_OUT] = sum(item.get_closest_marker("slow") is not None for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Called for each process of xdist that ends, with what it counted."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was left out, and how to run it."""
    skipped = Counter(_need(report) for report in terminalreporter.stats.get("skipped", []))
    ways = {
        "slow": ("slow", "uv run pytest -m slow"),
        "slurm": ("need a Slurm", "scripts/slurm-lab/up, then uv run pytest -m slurm"),
        "browser": ("need Chromium", "apt-get install chromium"),
        "gpu": ("need a GPU", "uv run pytest -m gpu, on a machine that has one"),
        "extras": ("need more packages", "uv run --all-extras --group peers --with trackio pytest -m extras"),
    }
    counts = {need: skipped[need] for need in ways} | {"slow": config.stash.get(LEFT_OUT, 0)}
    for need, count in counts.items():
        if count:
            what, way = ways[need]
            terminalreporter.write_line(f"left out: {count} tests ({what}); to run them: {way}")


def _need(report: Any) -> str:
    """What a skipped test needs, from its mark or its reason."""
    if "extras" in getattr(report, "keywords", ()):  # a module that was skipped whole has none
        return "extras"
    reason = str(report.longrepr).lower()
    return next((need for word, need in NEEDS.items() if word in reason), "")


NEEDS = {"slurm": "slurm", "chromium": "browser", "browser": "browser", "cuda": "gpu", "gpu": "gpu"}
"""Words in the reason of a skipped test."""


@pytest.fixture(scope="session", autouse=True)
def warm_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this process and those it starts fork theirs from; there is one once it is needed."""
    warm.copy_databases(tmp_path_factory.mktemp("database"))
    warm.keep_conversations()
    with warm.processes(ENVIRONMENT):
        yield


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Coverage is that of the fast tests: it makes all Python slower, here and in the processes that a test starts."""
    stopped, name = warm.stop_coverage(), "COVERAGE_PROCESS_CONFIG"
    settings = {name: os.environ.pop(name)} if name in os.environ else {}
    yield
    os.environ.update(settings)
    for each in stopped:
        each.start()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What a ``cold`` test starts is started anew; what a test leaves in the environment for libraries goes with it."""
    warm.is_wanted = not item.get_closest_marker("cold")
    before, modules = dict(os.environ), len(sys.modules)
    is_measured = not any(map(item.get_closest_marker, ("slow", "unmeasured")))
    with contextlib.nullcontext() if is_measured else unmeasured():
        yield
    warm.is_wanted = True
    if len(sys.modules) > modules + 100:  # a full collection of libraries that stay takes half a second each time
        gc.collect()
        gc.freeze()
    for name in warm.read_on_import({*before, *os.environ}):
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for the whole session (RUNNER_CACHE): conversions and tokenised data are made once."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["RUNNER_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without MLflow's, and what it leaves of them in the environment goes with it."""
    for name in (
        "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME",
        "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "RUNNER_WEBHOOK",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")


@pytest.fixture
def slurm(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Slurm that answers, and a folder to work in; nothing submitted there outlives the test."""
    from runner.errors import LaunchError
    from runner.tracking import slurm_commands

    try:
        slurm_commands.refuse_unreachable()
    except LaunchError as error:
        pytest.skip(f"no Slurm answers here, scripts/slurm-lab/up makes one ({error.faults[0].problem})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    cancel_jobs(tmp_path)


def until(is_true: Callable[[], Any], every_s: float = 0.05) -> Any:
    """Wait for this, and return it: as long as it takes on a busy machine; pytest's own limit ends what never comes."""
    while not (value := is_true()):
        time.sleep(every_s)
    return value


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    with mounted(tmp_path / "disk", "size=4m") as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system that lies in memory; where none may be mounted the test is skipped."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, leaving: int) -> Path:
    """Fill the disk but for so many bytes; returns the file that does."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(b"x" * (free - leaving))
    return filler


def jobs_of(folder: Path) -> list[str]:
    """The ids of the jobs that were submitted from this folder or below it, noted or not, and have not left the queue.

    Each task of an array is one of them.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i %Z"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = (line.strip().partition(" ") for line in lines)
    return [id for id, _, place in found if Path(place.strip()).is_relative_to(folder)]


def cancel_jobs(folder: Path) -> None:
    """Cancel all of ``jobs_of(folder)``."""
    if ids := jobs_of(folder):
        subprocess.run(["scancel", *ids], check=True, capture_output=True)


def node(group: str, name: str, /, **changes: Any) -> dict[str, Any]:
    """The YAML of an option on top of the one that it builds on, with some keys changed."""
    from runner.config.bind import config_dir

    found = yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())
    below = [base for base in found.pop("defaults", []) if base != "_self_"]
    return {**(node(group, below[0]) if below else {}), **found, **changes}


def option(group: str, name: str, /, **changes: Any) -> Any:
    """An option, bound: it waits for its run-time objects."""
    from runner.config.bind import bind

    return bind(node(group, name, **changes), group)


def composed(*overrides: str) -> dict[str, Any]:
    """The checked and frozen configuration of a command line, as a run folder would hold it."""
    from runner.cli import jobs

    with jobs.composed(list(overrides)) as (_, found):
        return dict(found[0].cfg)


def prepared(folder: Path, *overrides: str) -> RunDir:
    """A run folder ready for a worker."""
    from runner.tracking import manifest

    return manifest.create(composed(*overrides), folder, ["runner", *overrides], list(overrides))


def no_hooks(**others: Any) -> Any:
    """Hooks of a training that nobody follows, but for ``others``."""
    from runner.train.parts import Hooks

    def nothing(*_: Any) -> None:
        pass

    named = ("record", "evaluating", "saving", "check_stop", "warm")
    return Hooks(**{**dict.fromkeys(named, nothing), **others})


TINY = (
    "model=tiny", "tracking=offline", "data.max_length=128", "data.train_rows=64", "data.eval_rows=4",
    "train.sample_prompts=0",
)  # fmt: skip
"""A run of the default shape that takes seconds."""
