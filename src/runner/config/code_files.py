"""The files of the user's own code: find, list, copy and hash what the key ``code`` names. Nothing is imported.

Each entry is a Python file, a package folder, or the name of an importable package.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, Fault
from runner.files import user_path

KEY = "code"
FOLDER = "code"
"""Of a run folder: where the copy is."""
REMEDY = "name a Python file (code=my_lab.py), a package folder (code=my_lab) or an installed package"


def locate(entry: str) -> Path:
    """The file, or the folder of the package, that an entry of ``code`` names.

    Raises:
        ConfigError: no such file or package, or a module of Python or of this program has its name.
    """
    path = user_path(entry, KEY)
    exists = os.path.exists(path)
    if not entry.strip() or (not exists and (path.suffix == ".py" or "/" in entry)):
        raise ConfigError(Fault(KEY, "no such file or folder", REMEDY, entry))
    if not exists:
        path = _installed(entry)
    path = path.resolve()
    if path.is_file() and path.suffix != ".py":
        raise ConfigError(Fault(KEY, "is not a Python file", REMEDY, entry))
    if path.is_dir() and not any(path.glob("*.py")):
        raise ConfigError(Fault(KEY, "is a folder without Python files", REMEDY, entry))
    name = module_name(path)
    if not may_be_module(name):
        problem = f"'{name}' cannot be the name of a module of yours"
        raise ConfigError(Fault(KEY, problem, "rename it: letters, digits and _, no module of Python's", entry))
    return path


def module_name(path: Path) -> str:
    """``my_lab`` of ``my_lab.py`` and of the package folder ``my_lab``."""
    return path.name.removesuffix(".py")


def may_be_module(name: str) -> bool:
    return name.isidentifier() and name not in sys.stdlib_module_names and name not in ("runner", "hydra_plugins")


def files(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name below the copy's folder, file) of all that belongs to this code, sorted by name.

    Of a package all of its Python files; of a file the modules and packages beside it that it imports, directly or
    through each other. A module whose name is computed at run time is not found.
    """
    by_name: dict[str, Path] = {}
    for path in paths:
        parts = sorted(path.rglob("*.py")) if path.is_dir() else [path, *_imported(path)]
        by_name |= {str(part.relative_to(path.parent)): part for part in parts if "__pycache__" not in part.parts}
    return sorted(by_name.items())


def digest(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits over the names and texts of all files."""
    return digest_of(files(paths))[:16]


def digest_of(named: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over (name, file): the names and the bytes of the files, in this order."""
    total = hashlib.sha256()
    for name, file in named:
        text = file.read_bytes()
        total.update(f"{name}\0{len(text)}\0".encode() + text)
    return total.hexdigest()


def copy(paths: Iterable[Path], folder: Path) -> None:
    """Copy the code into ``folder``."""
    for name, file in files(paths):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def options(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Function name → its node as an option, for all functions of this code; nothing is imported.

    Keyword-only parameters are the keys, with their defaults as values; one without a default needs a value (``???``).
    """
    nodes: dict[str, dict[str, Any]] = {}
    for entry in entries:
        with contextlib.suppress(ConfigError):  # settle() reports it
            path = locate(entry)
            for name, file in files([path]):
                module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                for function in _functions(file):
                    nodes.setdefault(function.name, {"_target_": f"{module}.{function.name}", **_defaults(function)})
    return nodes


def _functions(file: Path) -> list[ast.FunctionDef]:
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):  # importing it reports that
        return []
    return [node for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _defaults(function: ast.FunctionDef) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for parameter, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        values[parameter.arg] = "???"
        with contextlib.suppress(ValueError):  # computed: the function itself fills it in
            if default is not None:
                values[parameter.arg] = ast.literal_eval(default)
                continue
        if default is not None:
            del values[parameter.arg]
    return values


def _installed(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(Fault(KEY, "no such file, folder or installed package", REMEDY, name))
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def _imported(file: Path) -> list[Path]:
    """The modules and packages beside ``file`` that it imports, anywhere in it, directly or through each other."""
    imported: set[Path] = set()
    remaining = [file]
    while remaining:
        for name in _names(remaining.pop()):
            new = {path for path in _beside(file.parent, name) if path != file} - imported
            imported |= new
            remaining += new
    return sorted(imported)


def _names(file: Path) -> set[str]:
    """The first part of each name that a file imports; empty if it is not Python: importing it will say so."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def _beside(folder: Path, name: str) -> Iterator[Path]:
    """The files of a module or package of this name in ``folder``.

    A folder without ``__init__.py`` counts only if no installed or built-in module has its name, as in Python.
    """
    is_package, is_module = (folder / name / "__init__.py").is_file(), (folder / f"{name}.py").is_file()
    if is_package or not (is_module or _is_elsewhere(name)):
        yield from (path for path in (folder / name).rglob("*.py") if path.is_file())
    elif is_module:
        yield folder / f"{name}.py"


def _is_elsewhere(name: str) -> bool:
    """Whether Python finds a module or package of this name, with a file or built in; nothing is imported."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported already, without a spec
        return True
    return spec is not None and spec.origin is not None
