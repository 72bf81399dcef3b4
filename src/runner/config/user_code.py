"""The user's own code: files and packages that the key ``code`` names, whose functions may be options.

Each entry is a Python file, a package folder, or the name of an importable package. A run keeps a copy of it in its
folder (``code/``), and a worker imports that copy: what is edited later changes no run.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.errors import ConfigError, Fault

KEY = "code"
FOLDER = "code"
"""Of a run folder: where the copy is."""
REMEDY = "name a Python file (code=my_lab.py), a package folder (code=my_lab) or an installed package"


PATHS = "_code_"
"""Key of a node with a ``_target_`` of the user's: where to import it from. Never written to a file: see ``attach``."""


def settle(cfg: dict[str, Any], search: Iterable[Path] = ()) -> None:
    """Find the code that a configuration names, and write its digests in the place of its paths.

    Files and packages in the folders ``search`` need no entry: a ``_target_`` below them is enough. A file that
    ``data.format.function`` names belongs to the code too.

    Raises:
        ConfigError: with every entry that names nothing.
    """
    cfg.setdefault(KEY, None)  # a run of version 0.1.0 has no such key
    if isinstance(cfg[KEY], Mapping):  # frozen already; attach() has found the run's own copy
        if not cfg.get(PATHS) or any(node.get(PATHS, cfg[PATHS]) != cfg[PATHS] for node in _nodes(cfg)):
            raise ConfigError(Fault(KEY, "is not where your code is", REMEDY, dict(cfg[KEY])))
        return
    refuse_given(cfg)
    entries = given(cfg)
    faults: list[Fault] = []
    paths: dict[str, Path] = {}
    function = _function(cfg)
    if function and (file := Path(function.rpartition(":")[0]).expanduser()).suffix == ".py" and file.is_file():
        entries.append(str(file))
        cfg["data"]["format"]["function"] = f"{file.name}:{function.rpartition(':')[2]}"
    for entry in entries:
        try:
            path = locate(entry)
        except ConfigError as error:
            faults += error.faults
            continue
        if (other := paths.setdefault(module_name(path), path)) != path:
            faults.append(Fault(KEY, f"has two modules called '{module_name(path)}' ({other})", "rename one", entry))
    for name in {target.partition(".")[0] for target in _targets(cfg)} - paths.keys() - {"runner"}:
        found = next(
            (path for folder in search for path in (folder / name, folder / f"{name}.py") if path.exists()), None
        )
        if found is not None:
            paths[name] = locate(str(found))
    if faults:
        raise ConfigError(*faults)
    if not paths:
        return
    cfg[KEY] = {name: digest([paths[name]]) for name in sorted(paths)}
    attach(cfg, list(paths.values()))


def options(entries: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Function name → the node that it is as an option, for all functions of this code; nothing is imported.

    Keyword-only parameters are the keys, with their defaults as values; one without a default needs a value (``???``).
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        with contextlib.suppress(ConfigError):  # settle() reports it
            path = locate(entry)
            for name, file in files([path]):
                module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                for function in _functions(file):
                    found.setdefault(function.name, {"_target_": f"{module}.{function.name}", **_defaults(function)})
    return found


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


def attach(cfg: dict[str, Any], paths: Sequence[Path]) -> None:
    """Note in each node that names a function of the user's where its code is (``PATHS``)."""
    if not paths:
        return
    places = [str(path) for path in paths]
    cfg[PATHS] = places
    for node in _nodes(cfg):
        if node.get("function") or not str(node["_target_"]).startswith("runner."):
            node[PATHS] = places


def refuse_given(cfg: Mapping[str, Any]) -> None:
    """Refuse a configuration in which somebody else noted where code is.

    Raises:
        ConfigError: with a remedy.
    """
    if detached(cfg) != cfg:
        raise ConfigError(Fault(PATHS, "cannot be set: it is noted where code=… is found", REMEDY))


def attach_copy(cfg: dict[str, Any], folder: Path) -> None:
    """``attach`` the copy below ``folder`` of the code that a frozen configuration names.

    Raises:
        ConfigError: a name that cannot be that of a module, such as a path that leads elsewhere.
    """
    refuse_given(cfg)
    if isinstance(cfg.get(KEY), Mapping):
        if unfit := [name for name in cfg[KEY] if not _may_be_module(str(name))]:
            raise ConfigError(Fault(KEY, "is no name of a module of yours", "restore config.yaml of the run", unfit))
        attach(cfg, [folder / name if (folder / name).is_dir() else folder / f"{name}.py" for name in cfg[KEY]])


def detached(node: Any) -> Any:
    """The configuration without what ``attach`` noted."""
    if not isinstance(node, Mapping):
        return node
    return {key: detached(value) for key, value in node.items() if key != PATHS}


def paths_of(cfg: Mapping[str, Any]) -> list[Path]:
    """What ``attach`` noted."""
    return [Path(path) for path in cfg.get(PATHS) or []]


def refuse_changed(cfg: Mapping[str, Any]) -> None:
    """Refuse a copy of the code that is not what was frozen.

    Raises:
        ConfigError: naming the module.
    """
    faults = []
    for path in paths_of(cfg):
        wanted = cfg[KEY][module_name(path)]
        if not path.exists():
            faults.append(Fault(KEY, f"{path} is missing", "restore it, or start a new run"))
        elif digest([path]) != wanted:
            faults.append(Fault(KEY, f"{path} was edited after the run began", "restore it, or start a new run"))
    if faults:
        raise ConfigError(*faults)


def edited(cfg: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
    """The files and packages that a run's copy was made of (name → path) and that are different now."""
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
        texts = [side[name].read_text().splitlines() if name in side else [] for side in (first, second)]
        lines += difflib.unified_diff(texts[0], texts[1], f"a/{name}", f"b/{name}", lineterm="")
    return "\n".join([*lines, ""]) if lines else ""


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """Every dict with a ``_target_``."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node
        for value in node.values():
            yield from _nodes(value)


def _targets(cfg: Mapping[str, Any]) -> Iterator[str]:
    return (str(node["_target_"]) for node in _nodes(cfg))


def _function(cfg: Mapping[str, Any]) -> str:
    """``data.format.function``; empty if the format has none."""
    data = cfg.get("data")
    form = data.get("format") if isinstance(data, Mapping) else None
    return str(form.get("function") or "") if isinstance(form, Mapping) else ""


def locate(entry: str) -> Path:
    """The file, or the folder of the package, that an entry of ``code`` names.

    Raises:
        ConfigError: there is none, or its name is that of a module of Python's or of this program.
    """
    path = Path(entry).expanduser()
    if not entry.strip() or (not path.exists() and (path.suffix == ".py" or "/" in entry)):
        raise ConfigError(Fault(KEY, "no such file or folder", REMEDY, entry))
    if not path.exists():
        path = _installed(entry)
    path = path.resolve()
    if path.is_file() and path.suffix != ".py":
        raise ConfigError(Fault(KEY, "is not a Python file", REMEDY, entry))
    if path.is_dir() and not any(path.glob("*.py")):
        raise ConfigError(Fault(KEY, "is a folder without Python files", REMEDY, entry))
    name = module_name(path)
    if not _may_be_module(name):
        problem = f"'{name}' cannot be the name of a module of yours"
        raise ConfigError(Fault(KEY, problem, "rename it: letters, digits and _, no module of Python's", entry))
    return path


def _may_be_module(name: str) -> bool:
    return name.isidentifier() and name not in sys.stdlib_module_names and name not in ("runner", "hydra_plugins")


def module_name(path: Path) -> str:
    """``my_lab`` of ``my_lab.py`` and of the package folder ``my_lab``."""
    return path.name.removesuffix(".py")


def files(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name below the copy's folder, file) of all that belongs to this code, sorted by name.

    Of a package all of its Python files; of a file the modules and packages beside it that it imports, directly or
    through each other. A module whose name is computed at run time is not found.
    """
    found: dict[str, Path] = {}
    for path in paths:
        parts = sorted(path.rglob("*.py")) if path.is_dir() else [path, *_imported(path)]
        found |= {str(part.relative_to(path.parent)): part for part in parts if "__pycache__" not in part.parts}
    return sorted(found.items())


def digest(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits over the names and texts of all files."""
    found = hashlib.sha256()
    for name, file in files(paths):
        text = file.read_bytes()
        found.update(f"{name}\0{len(text)}\0".encode() + text)
    return found.hexdigest()[:16]


def copy(paths: Iterable[Path], folder: Path) -> None:
    """Copy the code into ``folder``."""
    for name, file in files(paths):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


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


def _installed(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        raise ConfigError(Fault(KEY, "no such file, folder or installed package", REMEDY, name))
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


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


def _imported(file: Path) -> list[Path]:
    """The modules and packages beside ``file`` that it imports, anywhere in it, directly or through each other."""
    found: set[Path] = set()
    remaining = [file]
    while remaining:
        for name in _names(remaining.pop()):
            new = {path for path in _beside(file.parent, name) if path != file} - found
            found |= new
            remaining += new
    return sorted(found)


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


def given(cfg: Mapping[str, Any]) -> list[str]:
    """The entries of ``code``: a text, a list of texts, or null; of another type none, which checking reports."""
    value = cfg.get(KEY)
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if isinstance(entry, str)]
