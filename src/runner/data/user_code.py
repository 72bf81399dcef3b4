"""Which Python files of its own folder a file imports, read off their texts; and their import, out of others' way."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType


def imported(file: Path) -> list[Path]:
    """The modules and packages beside ``file`` that it imports, anywhere in it, directly or through each other.

    Of a package all of its Python files. What is only imported by a name that is computed is not found.
    """
    found: set[Path] = set()
    left = [file]
    while left:
        for name in _names(left.pop()):
            new = {path for path in _beside(file.parent, name) if path != file} - found
            found |= new
            left += new
    return sorted(found)


class Beside:
    """What a file imports from its own folder: within a ``with`` it can be imported, and outside in nobody's way.

    Another folder may hold modules of the same names, and they are others.
    """

    def __init__(self, file: Path) -> None:
        self._folder = str(file.parent)
        self._names = {path.relative_to(file.parent).parts[0].removesuffix(".py") for path in imported(file)}
        self._modules: dict[str, ModuleType] = {}
        self._others: dict[str, ModuleType] = {}

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self._names)

    def __enter__(self) -> None:
        self._others = {name: sys.modules[name] for name in self._names if name in sys.modules}
        sys.path.insert(0, self._folder)  # as for a script; before what has been edited since it was frozen
        sys.modules.update(self._modules)
        self._count = len(sys.modules)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError):
            sys.path.remove(self._folder)
        if len(sys.modules) != self._count:  # this is asked for every row
            ours = self._names - self._others.keys()
            self._modules |= {name: sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] in ours}
        for name in self._modules:
            sys.modules.pop(name, None)
        sys.modules.update(self._others)


def _names(file: Path) -> set[str]:
    """What a file imports, by the first part of each name; nothing where it is not Python: its import will say so."""
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
    """The files of a module or package of this name, in the order in which Python seeks them.

    A folder without ``__init__.py`` comes after all others, an installed package of its name too.
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
    except ValueError:  # imported already, by who left no word of where it is
        return True
    return spec is not None and spec.origin is not None
