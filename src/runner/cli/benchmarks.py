"""Benchmarks: tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), an optional extra."""

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

from runner.errors import ConfigError, DataError, Fault, first_line, suggest
from runner.files import user_path


@dataclass(frozen=True)
class Chosen:
    """The chosen tasks; all of them exist."""

    names: list[str]
    """Names of tasks and of task groups."""
    manager: Any
    """lm-eval's TaskManager, which finds tasks by name."""


def choose(tasks: list[str]) -> Chosen:
    """Find tasks by name or by YAML file.

    Raises:
        ConfigError: lm-eval is not installed, or a task does not exist (suggests the nearest name).
    """
    if importlib.util.find_spec("lm_eval") is None:
        remedy = (
            "pip install 'runner[eval]' (uv sync --extra eval), or evaluate on your own rows: data=local data.path=…"
        )
        raise ConfigError(Fault("--tasks", "needs lm-eval, which is not installed", remedy, ",".join(tasks)))
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {task: user_path(task, "--tasks") for task in tasks if task.endswith((".yaml", ".yml"))}
    faults = [_missing_file(task) for task, file in files.items() if not file.is_file()]
    if faults:
        raise ConfigError(*faults)
    folders = sorted({str(file.resolve().parent) for file in files.values()})
    manager = TaskManager(include_path=folders or None)
    known = set(manager.all_tasks)
    names = [_name_in(files[task]) if task in files else task for task in tasks]
    for name in names:
        if name not in known:
            remedy = suggest(name, known) or "list them: lm-eval ls tasks; the name of a file must end with .yaml"
            faults.append(Fault("--tasks", "lm-eval has no such task", remedy, name))
    if faults:
        raise ConfigError(*faults)
    return Chosen(names, manager)


def rows(chosen: Chosen, limit: int | None) -> dict[str, tuple[int, str]]:
    """Task → (number of rows to measure on, their digest); a group is expanded to its tasks.

    Raises:
        DataError: the rows of a task cannot be loaded.
    """
    from lm_eval.tasks import get_task_dict

    with _data_errors(chosen):
        return {name: _digest(docs, limit) for name, docs in _docs(get_task_dict(list(chosen.names), chosen.manager))}


def measure(chosen: Chosen, model: Any, tokenizer: Any, *, limit: int | None) -> dict[str, dict[str, float]]:
    """Task → metric → value, as lm-eval computes them.

    Raises:
        DataError: the rows of a task cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=_longest(model))
    with _data_errors(chosen):
        output = lm_eval.simple_evaluate(
            wrapped, tasks=chosen.names, task_manager=chosen.manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    return {name: _numbers(values) for name, values in output["results"].items()}


@contextlib.contextmanager
def _data_errors(chosen: Chosen) -> Iterator[None]:
    """Convert exceptions of lm-eval into DataError; out of memory passes unchanged."""
    try:
        yield
    except (OSError, ConnectionError, ValueError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        remedy = "tasks download their rows from the Hub: check the connection, or use your own YAML with local files"
        problem = f"cannot be run: {first_line(error)}"
        raise DataError(Fault("--tasks", problem, remedy, ",".join(chosen.names))) from error


def _docs(tree: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """(task, its rows) for every task of lm-eval's tree, in which groups contain tasks and groups."""
    for name, task in tree.items():
        if isinstance(task, Mapping):
            yield from _docs(task)
        elif (docs := getattr(task, "eval_docs", None)) is not None:
            yield str(name), docs


def _digest(docs: Any, limit: int | None) -> tuple[int, str]:
    """(number of rows, their digest) of the first ``limit`` rows; of all rows if it is None."""
    digest, count = hashlib.sha256(), 0
    for doc in islice(docs, limit):
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
        count += 1
    return count, digest.hexdigest()[:32]


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Keep numbers; ``acc,none`` → ``acc``, ``acc,strict`` → ``acc_strict`` (a filter of lm-eval)."""
    numbers = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
            numbers[metric if filter_name == "none" else f"{metric}_{filter_name}"] = float(value)
    return numbers


def _longest(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _missing_file(task: str) -> Fault:
    return Fault("--tasks", "no such file", "give a YAML file in lm-eval's format, or the name of a task", task)


def _name_in(file: Path) -> str:
    """The task name in a YAML file (``task:`` or ``group:``), read as text."""
    for line in file.read_text().splitlines():
        if line.startswith(("task:", "group:")):
            return line.partition(":")[2].strip().strip("'\"")
    raise ConfigError(Fault("--tasks", "contains no task name", "add a line task: NAME", file))
