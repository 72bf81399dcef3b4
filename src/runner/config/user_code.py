"""The user's own code: its functions may be options of any group.

A run keeps a copy of the files that the key ``code`` names (``code_files``) in its folder, and a worker imports that
copy: what is edited later changes no run.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.config.code_files import KEY, REMEDY, digest, files, locate, may_be_module, module_name
from runner.errors import ConfigError, Fault, refuse
from runner.files import user_path

PATHS = "_code_"
"""Key of a node with a ``_target_`` of the user's: where to import it from. Never written to a file: see ``attach``."""


def settle(cfg: dict[str, Any], search: Iterable[Path] = ()) -> None:
    """Find the code that a configuration names, and write its digests in the place of its paths.

    Files and packages in the folders ``search`` need no entry: a ``_target_`` below them is enough. A file that
    ``data.format.function``, ``task.rewards``, ``train.metrics``, ``train.callbacks`` or ``tracking.also`` names
    belongs to the code too.

    Raises:
        ConfigError: with every entry that does not exist.
    """
    cfg.setdefault(KEY, None)  # a run of version 0.1.0 has no such key
    if isinstance(cfg[KEY], Mapping):  # frozen already; attach() has found the run's own copy
        if not cfg.get(PATHS) or any(node.get(PATHS, cfg[PATHS]) != cfg[PATHS] for node in _nodes(cfg)):
            raise ConfigError(Fault(KEY, "is not where your code is", REMEDY, dict(cfg[KEY])))
        return
    refuse_given(cfg)
    entries = entries_of(cfg)
    faults: list[Fault] = []
    paths: dict[str, Path] = {}
    for node, key in _functions_named(cfg):
        file, _, name = str(node[key]).rpartition(":")
        path = user_path(file)
        if path.suffix == ".py" and os.path.isfile(path):
            entries.append(str(path))
            node[key] = f"{path.name}:{name}"
    for entry in entries:
        try:
            path = locate(entry)
        except ConfigError as error:
            faults += error.faults
            continue
        if (other := paths.setdefault(module_name(path), path)) != path:
            faults.append(Fault(KEY, f"has two modules called '{module_name(path)}' ({other})", "rename one", entry))
    for name in {target.partition(".")[0] for target in _targets(cfg)} - paths.keys() - {"runner"}:
        location = next(
            (path for folder in search for path in (folder / name, folder / f"{name}.py") if os.path.exists(path)), None
        )
        if location is not None:
            paths[name] = locate(str(location))
    refuse(faults)
    if not paths:
        return
    cfg[KEY] = {name: digest([paths[name]]) for name in sorted(paths)}
    attach(cfg, list(paths.values()))


def entries_of(cfg: Mapping[str, Any]) -> list[str]:
    """The entries of ``code``: a text, a list of texts, or null; of another type none, which checking reports."""
    value = cfg.get(KEY)
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, str)]


def attach(cfg: dict[str, Any], paths: Sequence[Path]) -> None:
    """Add the paths of its code (``PATHS``) to each node that names a function of the user's."""
    if not paths:
        return
    places = [str(path) for path in paths]
    cfg[PATHS] = places
    for node in _nodes(cfg):
        if node.get("function") or node.get("rewards") or not str(node["_target_"]).startswith("runner."):
            node[PATHS] = places


def attach_copy(cfg: dict[str, Any], folder: Path) -> None:
    """``attach`` the copy below ``folder`` of the code that a frozen configuration names.

    Raises:
        ConfigError: a name that cannot be that of a module, such as a path that leads elsewhere.
    """
    refuse_given(cfg)
    if isinstance(cfg.get(KEY), Mapping):
        if unfit := [name for name in cfg[KEY] if not may_be_module(str(name))]:
            raise ConfigError(Fault(KEY, "is no name of a module of yours", "restore config.yaml of the run", unfit))
        attach(cfg, [folder / name if (folder / name).is_dir() else folder / f"{name}.py" for name in cfg[KEY]])


def refuse_given(cfg: Mapping[str, Any]) -> None:
    """Refuse a configuration that contains paths of code which ``attach`` has not added."""
    if detached(cfg) != cfg:
        raise ConfigError(Fault(PATHS, "cannot be set: it is noted where code=… is found", REMEDY))


def detached(node: Any) -> Any:
    """The configuration without the paths that ``attach`` added."""
    if not isinstance(node, Mapping):
        return node
    return {key: detached(value) for key, value in node.items() if key != PATHS}


def paths_of(cfg: Mapping[str, Any]) -> list[Path]:
    """The paths that ``attach`` added."""
    return [Path(path) for path in cfg.get(PATHS) or []]


def refuse_changed(cfg: Mapping[str, Any]) -> None:
    """Refuse a copy of the code that was changed."""
    remedy, paths = "restore it, or start a new run", paths_of(cfg)
    refuse(Fault(KEY, f"{path} is missing", remedy) for path in paths if not path.exists())
    changed = (path for path in paths if digest([path]) != cfg[KEY][module_name(path)])
    refuse(Fault(KEY, f"{path} was edited after the run began", remedy) for path in changed)


def edited(cfg: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """The files and packages (``sources``: name → path) that were edited since the run copied them."""
    frozen = cfg.get(KEY) or {}
    paths = {name: Path(path) for name, path in sources.items()}
    return [
        str(path) for name, path in paths.items() if path.exists() and digest([path]) != frozen.get(module_name(path))
    ]


def patch(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The lines in which the code of two runs differs, as a unified diff."""
    first, second = (dict(files(paths_of(cfg))) for cfg in (ours, theirs))
    lines: list[str] = []
    for name in sorted(first.keys() | second.keys()):
        texts = [_lines(side[name]) if name in side else [] for side in (first, second)]
        lines += difflib.unified_diff(texts[0], texts[1], f"a/{name}", f"b/{name}", lineterm="")
    return "\n".join([*lines, ""]) if lines else ""


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="backslashreplace").splitlines()


def load(name: str, paths: Sequence[Path]) -> ModuleType:
    """Import the module ``name`` (``my_lab`` or ``my_lab.optim``) of this code.

    Another version of a module of that name, imported for another run, is replaced.

    Raises:
        ConfigError: it cannot be imported, with the file and line where that failed.
    """
    top = next((path for path in paths if module_name(path) == name.partition(".")[0]), None)
    if top is None:
        names = ", ".join(module_name(path) for path in paths)
        problem = f"'{name}' is not part of code ({names or 'which is empty'})"
        raise ConfigError(Fault("", problem, "add its file or package: code=[…]"))
    _forget_others(paths)
    for path in reversed(paths):  # the modules beside a file are importable, as for a script
        folder = str(path.parent)
        if sys.path[:1] != [folder]:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
            sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(Fault("", f"no module '{error.name}' in {top}", "correct the name")) from error
        raise ConfigError(_failed(error, paths)) from error
    except Exception as error:
        raise ConfigError(_failed(error, paths)) from error


def from_user_code(function: Any, paths: Iterable[Path]) -> bool:
    """Whether the function is defined in this code, and not only imported there."""
    name = str(getattr(function, "__module__", "")).partition(".")[0]
    own = {part.removesuffix(".py").partition("/")[0] for part, _ in files(paths)}
    return name in own


def _failed(error: Exception, paths: Iterable[Path]) -> Fault:
    """The fault of an import that raised, at the last line of the user's that was reached."""
    own = {str(file) for _, file in files(paths)}
    where, trace = "", error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        where = f" ({file}, line {trace.tb_lineno})" if file in own else where
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    return Fault(KEY, f"cannot be imported: {type(error).__name__}: {error}{where}", "correct the file")


def _forget_others(paths: Iterable[Path]) -> None:
    """Remove modules from sys.modules that have a name of this code and were loaded from other files."""
    own = dict(files(paths))
    tops = {name.removesuffix(".py").partition("/")[0] for name in own}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in tops:
            continue
        origin = getattr(module, "__file__", None)
        if origin is None or Path(origin) not in own.values():
            del sys.modules[name]


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every dict with a ``_target_``."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node
        for value in node.values():
            yield from _nodes(value)


def _targets(cfg: Mapping[str, Any]) -> Iterator[str]:
    return (str(node["_target_"]) for node in _nodes(cfg))


def _forms(node: Any) -> Iterator[dict[str, Any]]:
    """The formats of ``data`` and of each data set inside of it."""
    if isinstance(node, dict):
        if isinstance(form := node.get("format"), dict):
            yield form
        for value in node.values():
            yield from _forms(value)


def _functions_named(cfg: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(dict or list, key or index) of every value that names a function of the user's."""
    data, task, train = (cfg.get(group) for group in ("data", "task", "train"))
    rewards = task.get("rewards") if isinstance(task, Mapping) else None
    of_train = [train.get(key) for key in ("metrics", "callbacks")] if isinstance(train, Mapping) else []
    tracking = cfg.get("tracking")
    also = tracking.get("also") if isinstance(tracking, Mapping) else None
    if isinstance(also, str):
        yield tracking, "also"
    yield from ((form, "function") for form in _forms(data) if isinstance(form.get("function"), str))
    for functions in (rewards, also, *of_train):
        if isinstance(functions, list):
            yield from ((functions, at) for at, function in enumerate(functions) if isinstance(function, str))
