"""The tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), an optional extra."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, DataError, Fault, suggest


@dataclass(frozen=True)
class Chosen:
    """Tasks that exist."""

    names: list[str]
    """Names of tasks, and of groups of them."""
    manager: Any
    """lm-eval's TaskManager, which knows where each lies."""


def choose(tasks: list[str]) -> Chosen:
    """The tasks by their names, or by YAML files.

    Raises:
        ConfigError: lm-eval is not installed, or a task does not exist (with the nearest that does).
    """
    if importlib.util.find_spec("lm_eval") is None:
        remedy = "pip install 'runner[eval]' (uv sync --extra eval); without it your own rows: data=local data.path=…"
        raise ConfigError(Fault("--tasks", "needs lm-eval, which is not installed", remedy, ",".join(tasks)))
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {task: Path(task).expanduser() for task in tasks if task.endswith((".yaml", ".yml"))}
    faults = [_no_file(task) for task, file in files.items() if not file.is_file()]
    if faults:
        raise ConfigError(*faults)
    folders = sorted({str(file.resolve().parent) for file in files.values()})
    manager = TaskManager(include_path=folders or None)
    known = set(manager.all_tasks)
    names = [_name_in(files[task]) if task in files else task for task in tasks]
    for name in names:
        if name not in known:
            remedy = suggest(name, known) or "lm-eval ls tasks lists them; a file of your own ends with .yaml"
            faults.append(Fault("--tasks", "lm-eval has no such task", remedy, name))
    if faults:
        raise ConfigError(*faults)
    return Chosen(names, manager)


def rows(chosen: Chosen, limit: int | None) -> dict[str, tuple[int, str]]:
    """Task → how many rows it will be measured on, and their digest; of a group each of its tasks.

    Raises:
        DataError: the rows of a task cannot be had.
    """
    from lm_eval.tasks import get_task_dict

    with _told(chosen):
        return {name: _digest(docs, limit) for name, docs in _docs(get_task_dict(list(chosen.names), chosen.manager))}


def measure(chosen: Chosen, model: Any, tokenizer: Any, *, limit: int | None) -> dict[str, dict[str, float]]:
    """Task → metric → value, as lm-eval counts them.

    Raises:
        DataError: the rows of a task cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=_longest(model))
    with _told(chosen):
        found = lm_eval.simple_evaluate(
            wrapped, tasks=chosen.names, task_manager=chosen.manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return {name: _numbers(values) for name, values in found["results"].items()}


@contextlib.contextmanager
def _told(chosen: Chosen) -> Iterator[None]:
    """What lm-eval fails of, in our words."""
    try:
        yield
    except (OSError, ConnectionError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        text = (str(error).splitlines() or [type(error).__name__])[0][:300]
        remedy = "tasks fetch their rows from the Hub: is it in reach? A YAML of your own may name local files"
        raise DataError(Fault("--tasks", f"cannot be run: {text}", remedy, ",".join(chosen.names))) from error


def _docs(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """(task, its rows) of what lm-eval makes of names: tasks, and groups with tasks and groups in them."""
    for name, found in tree.items():
        if isinstance(found, Mapping):
            yield from _docs(found)
        elif (docs := getattr(found, "eval_docs", None)) is not None:
            yield str(name), docs


def _digest(docs: Any, limit: int | None) -> tuple[int, str]:
    """(rows, digest) of those that are asked."""
    made, count = hashlib.sha256(), 0
    for doc in islice(docs, limit):
        made.update(json.dumps(doc, sort_keys=True, default=str).encode())
        count += 1
    return count, made.hexdigest()[:32]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` → ``acc``; with a filter's name where it is one."""
    numbers = {}
    for key, value in values.items():
        metric, _, chosen_filter = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
            numbers[metric if chosen_filter == "none" else f"{metric}_{chosen_filter}"] = float(value)
    return numbers


def _longest(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _no_file(task: str) -> Fault:
    return Fault("--tasks", "no such file", "name a YAML file of lm-eval's form, or one of its tasks", task)


def _name_in(file: Path) -> str:
    """The name that a task file gives itself."""
    for line in file.read_text().splitlines():
        if line.startswith(("task:", "group:")):
            return line.partition(":")[2].strip().strip("'\"")
    raise ConfigError(Fault("--tasks", "names no task", "give it a line task: NAME", file))
