"""The house stands: imports go down, and starting the program loads nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "runner"

FLOORS = ["config", "data models tracking", "tasks report", "train", "launch", "sweep", "cli"]
"""Packages, from the ground up: each may import those on lower floors, and the leaf modules."""
LEAVES = [
    "errors",
    "secrets",
    "files",
    "signals",
    "streams",
    "log_handlers",
    "terminal",
    "imports",
    "environment_variables",
]
"""Modules without a package: each may import those before it."""
ENTRY_POINTS = {"__main__", "worker", "mirror"}
INSIDE = {
    "tracking": ["", "also mlflow", "mirror"],
    "models": ["kernels", "", "quantization"],
    "train": ["distributed memory", ""],
    "launch": ["", "local slurm"],
}
"""Packages that have packages inside, from the ground up; "" are the modules of the package itself."""

RANK_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor.split()}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
FOLDERS = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.rglob("__init__.py")}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports when it is loaded or later, those for type checkers aside."""
    found: set[str] = set()
    for node in _walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("runner."):
            module = str(node.module).removeprefix("runner").removeprefix(".")
            names = [f"{module}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in MODULES else module for name in names}
    return found - {""}  # runner.PACKAGE


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _walk(child)


def fault(module: str, other: str) -> str:
    """Why ``module`` may not import ``other``; empty where it may."""
    (package, _, rest), (below, _, other_rest) = module.partition("."), other.partition(".")
    if module in ENTRY_POINTS:
        return ""
    if below in LEAVES:
        return "" if package not in LEAVES or LEAVES.index(below) < LEAVES.index(package) else "leaves go one way"
    if package in LEAVES or other in ENTRY_POINTS or below not in RANK_OF:
        return "a leaf imports leaves alone, and nobody imports an entry point"
    if package != below:
        return "" if RANK_OF[below] < RANK_OF[package] else "packages import lower floors only"
    order = [name for floor in INSIDE.get(package, [""]) for name in floor.split(" ")]
    rank = {name: n for n, floor in enumerate(INSIDE.get(package, [""])) for name in floor.split(" ")}
    inner, other_inner = rest.rpartition(".")[0], other_rest.rpartition(".")[0]
    assert {inner, other_inner} <= set(order), f"{module} or {other} lies in a folder that INSIDE does not name"
    return "" if inner == other_inner or rank[other_inner] < rank[inner] else f"inside {package} imports go {order}"


def test_every_package_has_a_floor_and_a_purpose():
    assert {name.partition(".")[0] for name in MODULES if "." in name} == set(RANK_OF)
    assert {name for name in MODULES if "." not in name} == {*LEAVES, *ENTRY_POINTS}
    for folder in FOLDERS - {""}:
        (only,) = ast.parse((PACKAGE / folder.replace(".", "/") / "__init__.py").read_text()).body
        assert isinstance(only, ast.Expr), f"{folder}/__init__.py holds its purpose as a docstring and nothing else"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_strictly_down(module: str):
    told = {other: problem for other in imported(MODULES[module]) if (problem := fault(module, other))}
    assert not told


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_its_name(module: str):
    """``from runner.tracking import manifest``, never ``as`` something else: one word for one thing."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("runner."):
            renamed = [alias.name for alias in node.names if alias.asname]
            assert not renamed


WITHOUT_TESTS = dict.fromkeys(ENTRY_POINTS, "what starts processes tests it")
"""Module → why no file of tests has its name."""


def test_each_module_has_its_tests_in_the_file_of_its_name():
    """``tests/<package>/test_<module>.py``. pytest takes no two files of one name: where two packages have a module of
    one name, ``test_<package>_<module>.py`` is right, too."""
    tests, times = Path(__file__).parent, Counter(module.rpartition(".")[2] for module in MODULES)
    without = set()
    for module in MODULES:
        *packages, name = module.split(".")
        names = [name, f"{packages[-1]}_{name}"] if packages and times[name] > 1 else [name]
        if not any(tests.joinpath(*packages, f"test_{each}.py").is_file() for each in names):
            without.add(module)
    assert without == set(WITHOUT_TESTS)
    files = Counter(path.name for path in tests.rglob("test_*.py"))
    assert not [name for name, count in files.items() if count > 1]


def test_no_module_imports_itself_in_a_circle():
    graph = {module: imported(path) & set(MODULES) for module, path in MODULES.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "mlflow", "peft", "bitsandbytes", "datasets", "pandas", "pyarrow"}


def test_importing_the_command_line_loads_nothing_heavy():
    modules = ["cli.main", "config.compose", "config.check", "tracking.manifest", "train.worker"]
    assert not loaded_by("import " + ", ".join(f"runner.{name}" for name in modules)) & HEAVY


@pytest.mark.parametrize(
    "verb",
    ["status", "logs", "cancel", "compare", "diff", "rerun", "ui", "generate", "export", "register", "evaluate"],
)
def test_watching_loads_nothing_heavy(verb: str, tmp_path: Path):
    lines = [[f"outputs_dir={tmp_path}"], ["--help"], [f"outputs_dir={tmp_path}", "nothing"]]
    statements = [f"main.run({[verb, *words]})" for words in lines]
    assert not loaded_by("\n".join(["from runner.cli import main", *statements])) & HEAVY


def test_composing_and_checking_the_default_run_loads_nothing_heavy():
    statement = "from runner.cli import jobs\nwith jobs.composed([]) as found: pass"
    assert not loaded_by(statement) & HEAVY


def test_files_stay_in_one_process(request: pytest.FixtureRequest) -> None:
    """What shares a Slurm or a server does not run beside itself; pytest-xdist shows the group behind ``@``."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@test_floors")
