"""The house stands: imports go down, and starting the program loads nothing heavy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "runner"

FLOORS = [
    {"errors", "secrets", "intervals", "heap"},
    {"files"},
    {"rundir"},
    {"condition", "config", "sweepdir", "schema", "console", "stop", "readers", "precision", "adapter", "rest",
     "compiling", "ranks", "shards", "scheduler", "provenance", "checkout", "served",
     "imported", "scratch"},
    {"asked", "prepare", "quant", "lora", "formats", "sources", "optim", "torch_optim", "schedules",
     "tracking", "packing", "splits", "parallel", "gguf", "hub", "modeldir", "tiny", "system", "named", "mirrored",
     "outcome", "converter", "documents", "fused", "head", "readings", "usage"},
    {"halving", "ahead", "jobs", "attached"},
    {"search", "chat", "attention", "origins", "store", "sweeps", "standing", "mirroring", "recompute"},
    {"sending"},
    {"models", "loss", "data", "meters", "checkpoint", "samples", "mlflow_run",
     "status", "logs", "cancel", "choices"},
    {"results", "recorded"},
    {"columns", "stored", "contrast"},
    {"ranking", "comparable", "curves", "diff", "worktree", "ui"},
    {"leaderboard"},
    {"page"},
    {"mlflow_leaderboard", "charts"},
    {"tasks", "mlflow_sweep", "memory"},
    {"spread", "follow"},
    {"train", "sweep_mirror", "compare"},
    {"expected"},
    {"build", "checks", "report", "mirror", "likeness"},
    {"probe"},
    {"worker", "plan", "folders", "trained", "card"},
    {"launch", "generate", "merge", "benchmarks"},
    {"explain", "export"},
    {"compose", "space", "register"},
    {"admit", "dataset", "study"},
    {"sweeping", "evaluate"},
    {"rerun", "searching"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a module imports when it is loaded or later, type checking aside."""
    found: set[str] = set()
    for node in _walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "runner":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("runner."):
            found.add(str(node.module).split(".")[1])
    return found


def _walk(node: ast.AST):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _walk(child)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_strictly_down(path: Path):
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}, which is not below it"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "mlflow", "peft", "bitsandbytes", "datasets", "pandas", "pyarrow"}


def test_importing_the_command_line_loads_nothing_heavy():
    assert not loaded_by("import runner.cli, runner.compose, runner.checks, runner.prepare, runner.worker") & HEAVY


@pytest.mark.parametrize(
    "verb",
    ["status", "logs", "cancel", "compare", "diff", "rerun", "ui", "generate", "export", "register", "evaluate"],
)
def test_watching_loads_nothing_heavy(verb: str, tmp_path: Path):
    for words in ([f"outputs_dir={tmp_path}"], ["--help"], [f"outputs_dir={tmp_path}", "nothing"]):
        assert not loaded_by(f"from runner import cli\nimport os\ncli.run({[verb, *words]})") & HEAVY


def test_composing_and_checking_the_default_run_loads_nothing_heavy():
    statement = "from runner import cli\nwith cli.composed([]) as found: pass"
    assert not loaded_by(statement) & HEAVY


def test_files_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """What shares a Slurm or a server does not run beside itself; pytest-xdist says so by a name behind ``@``."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_floors")
