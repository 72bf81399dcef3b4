"""A function of the user's that a key names, as ``path/to/file.py:name`` or ``package.module:name``.

A file that a key names is part of the user's code: see ``user_code.settle``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import code_files, user_code
from runner.errors import ConfigError, Fault, first_line, suggest
from runner.files import user_path


def faults(key: str, function: str, code: Sequence[str], example: str = "") -> Iterator[Fault]:
    """A file, module or name that does not exist, or a file that is not Python; nothing is run.

    ``key``: the key that names the function; ``code``: where the user's code is; ``example``: a right value of the key.
    """
    name = function.rpartition(":")[2]
    try:
        tree = ast.parse(source(key, function, code, example).read_bytes())
    except ConfigError as error:
        yield from error.faults
        return
    except SyntaxError as error:  # also for bytes in another encoding than the file declares
        where = f" (line {error.lineno})" if error.lineno else ""
        yield Fault(key, f"is not Python: {error.msg}{where}", "correct the file", function)
        return
    except (OSError, ValueError) as error:  # ValueError: NUL bytes
        yield Fault(key, f"cannot be read: {first_line(error)}", "correct the file, or its permissions", function)
        return
    bound = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    bound |= {alias.asname or alias.name for n in tree.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    bound |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    if name not in bound:
        problem = f"defines no function '{name}'. {suggest(name, bound)}".strip(" .")
        yield Fault(key, problem, "correct the name", function)


def source_text(function: str, code: Sequence[str]) -> str:
    """The text of a function's file, and digests of the modules that it imports from the same folder.

    Raises:
        ConfigError: no such file or module exists.
    """
    file = source("function", function, code)
    is_own = code or function.rpartition(":")[0].endswith(".py")
    beside = [path for _, path in code_files.files([file]) if path != file] if is_own else []
    parts = [f"{path.relative_to(file.parent)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in beside]
    return "\0".join([file.read_text(encoding="utf-8", errors="backslashreplace"), *parts])


def source(key: str, function: str, code: Sequence[str], example: str = "") -> Path:
    """The file that holds a function: in the user's code, or of an installed package.

    Raises:
        ConfigError: no such file or module exists.
    """
    where, _, name = function.rpartition(":")
    if not where or not name.isidentifier():
        remedy = f"for example {example or 'file.py:name'}"
        raise ConfigError(Fault(key, "must be path/to/file.py:name or package.module:name", remedy, function))
    module, paths = _module(function, code)
    for path in paths:
        first, *rest = module.split(".")
        if code_files.module_name(path) == first:
            inside = path.joinpath(*rest)
            candidates = [inside / "__init__.py", inside.with_suffix(".py")] if path.is_dir() else [path]
            if existing := next((each for each in candidates if os.path.isfile(each)), None):
                return existing.absolute()
    try:
        spec = importlib.util.find_spec(where) if not where.endswith(".py") else None
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        remedy = "correct it; a file is sought from the current directory, a module on Python's path"
        raise ConfigError(Fault(key, "no such file or module", remedy, function))
    return Path(spec.origin)


@functools.lru_cache
def load(key: str, function: str, code: tuple[str, ...]) -> Callable[..., Any]:
    """The function itself; its module is imported.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    name = function.rpartition(":")[2]
    module, paths = _module(function, code)
    is_own = module.partition(".")[0] in map(code_files.module_name, paths)
    try:
        value = getattr(user_code.load(module, paths) if is_own else importlib.import_module(module), name, None)
    except ConfigError as error:
        raise ConfigError(*(replace(fault, key=key, value=function) for fault in error.faults)) from None
    except (Exception, SystemExit) as error:
        problem = f"cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(Fault(key, problem, "correct the file", function)) from error
    if not callable(value):
        raise ConfigError(Fault(key, f"defines no function '{name}'", "correct the name", function))
    call: Callable[..., Any] = value
    return call


def place_of(error: BaseException) -> str:
    """`` (FILE, line 12)``: where a function failed, the last frame of the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace is not None else ""


def _module(function: str, code: Sequence[str]) -> tuple[str, list[Path]]:
    """The module of a function, and the user's code: the run's copy, or the file that a run of 0.1.0 names."""
    where = function.rpartition(":")[0]
    paths = [Path(path) for path in code]
    if where.endswith(".py"):
        return Path(where).stem, paths or [user_path(where)]
    return where, paths
