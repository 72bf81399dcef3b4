"""Metrics of evaluations, with their directions, and checks of the keys of ``train`` that name them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from runner.config import data_nodes, user_code, user_function
from runner.config.bind import bind
from runner.errors import Fault, suggest

Direction = Literal["minimize", "maximize"]
METRIC, METRICS = "train.metric_for_best_model", "train.metrics"
BUILT_IN = {name: f"runner.tasks.answer_metrics:{name}" for name in ("exact_match", "f1", "rouge_l")}
"""Name in ``train.metrics`` → the function."""
PASS_AT, PASSED = re.compile(r"pass_at_([1-9]\d{0,3})"), "runner.tasks.code_tests:passed"
SAMPLES, TEMPERATURE = "train.metric_samples", "train.metric_temperature"
USUAL_TEMPERATURE = 0.8
"""Of conf/train."""
OF_BUILT_IN: Direction = "maximize"


def task_name(cfg: Mapping[str, Any]) -> str:
    return str(cfg["task"]["_target_"]).rpartition(".")[2]


def has_own_task(cfg: Mapping[str, Any]) -> bool:
    """Whether the task is a function of the user's, whose metrics are not known before the run."""
    return not str(cfg["task"]["_target_"]).startswith("runner.")


def measures(cfg: Mapping[str, Any]) -> dict[str, Direction | None]:
    """Full name of each metric of an evaluation → its direction; see ``Task.measures``."""
    sets = ["", *(f"{name}/" for name in data_nodes.held_out_names(cfg["data"]))]
    of_task: Mapping[str, Direction | None] = bind(cfg["task"], "task")().measures
    of_answers = {
        name_of(name): OF_BUILT_IN if function_of(name) != name else None for name in cfg["train"].get("metrics") or ()
    }
    of_sets = {f"eval/{each}{name}": direction for each in sets for name, direction in of_task.items()}
    return {**of_sets, **{f"eval/{name}": direction for name, direction in of_answers.items()}}


def function_of(metric: str) -> str:
    """The function of an entry of ``train.metrics``: file.py:name or package.module:name."""
    return PASSED if pass_at(metric) else BUILT_IN.get(metric, metric)


def pass_at(metric: str) -> int | None:
    """The K of ``pass_at_K``; None for other metrics."""
    found = PASS_AT.fullmatch(metric)
    return int(found[1]) if found else None


def name_of(metric: str) -> str:
    """The name under which an entry of ``train.metrics`` is logged."""
    return metric.rpartition(":")[2]


def _answer_faults(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Entries of ``train.metrics`` that are no functions, and tasks whose rows have no prompts with answers."""
    metrics = cfg["train"].get("metrics") or []
    task = bind(cfg["task"], "task")()
    example = f"{METRICS}=[exact_match], or {METRICS}=[metrics.py:is_short]"
    for metric in metrics:
        if ":" not in metric and function_of(metric) == metric:
            remedy = f"{suggest(metric, BUILT_IN)} write {', '.join(BUILT_IN)}, pass_at_K, or file.py:name".strip()
            yield Fault(METRICS, "is neither built in nor a function", remedy, metric)
        else:
            yield from user_function.faults(METRICS, function_of(metric), cfg.get(user_code.PATHS) or (), example)
    names = [name_of(metric) for metric in metrics]
    if twice := [name for name in names if names.count(name) > 1 or name in task.measures]:
        problem = f"gives two metrics the name eval/{twice[0]}"
        yield Fault(METRICS, problem, "rename the function", metrics)
    yield from _sample_faults(cfg["train"], metrics)
    if metrics and not task.has_references:
        problem = f"rows of task={task.name} have no prompts with answers"
        yield Fault(METRICS, problem, "set it to []", metrics)


def _sample_faults(train: Mapping[str, Any], metrics: list[str]) -> Iterator[Fault]:
    samples, temperature = train.get("metric_samples", 1), train.get("metric_temperature", USUAL_TEMPERATURE)
    for metric in metrics:
        if (most := pass_at(metric) or 0) > samples:
            problem = f"needs {most} answers to each prompt, and {SAMPLES} is {samples}"
            yield Fault(METRICS, problem, f"set {SAMPLES} to {most} or more", metric)
    if samples > 1 and not metrics:
        yield Fault(SAMPLES, f"has no effect without {METRICS}", f"set {METRICS} too, or this to 1", samples)
    if samples == 1 and temperature != USUAL_TEMPERATURE:
        problem = f"has no effect with {SAMPLES}=1: the one answer has the most likely tokens"
        yield Fault(TEMPERATURE, problem, f"set {SAMPLES} too, or this to {USUAL_TEMPERATURE}", temperature)


def direction(cfg: Mapping[str, Any]) -> Direction | None:
    """In which direction ``train.metric_for_best_model`` improves; None if that is not known."""
    if (larger := cfg["train"].get("greater_is_better")) is not None:
        return "maximize" if larger else "minimize"
    name = cfg["train"].get("metric_for_best_model")
    return measures(cfg).get(name, "minimize" if name == "eval/loss" else None)


def faults(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Keys that cannot take effect, and metrics that no evaluation has."""
    train = cfg["train"]
    yield from _answer_faults(cfg)
    if train.get("loss_watchdog_threshold") is None and (steps := train.get("loss_watchdog_patience", 3)) != 3:
        problem = "has no effect without train.loss_watchdog_threshold"
        yield Fault("train.loss_watchdog_patience", problem, "set it too, or this to 3", steps)
    if train.get("metric_for_best_model") is not None:
        yield from _metric_faults(cfg, str(train["metric_for_best_model"]))
    else:
        remedy = "set it too, for example to eval/loss"
        for key, neutral in (
            ("early_stopping_patience", None), ("early_stopping_threshold", 0), ("greater_is_better", None),
        ):  # fmt: skip
            if (value := train.get(key, neutral)) != neutral:
                yield Fault(f"train.{key}", f"has no effect without {METRIC}", remedy, value)
        return
    if train["early_stopping_threshold"] and train["early_stopping_patience"] is None:
        remedy = "set train.early_stopping_patience too"
        yield Fault(
            "train.early_stopping_threshold", "has no effect without it", remedy, train["early_stopping_threshold"]
        )


def _metric_faults(cfg: Mapping[str, Any], name: str) -> Iterator[Fault]:
    train, known = cfg["train"], measures(cfg)
    every, last = train["eval_steps"], train["max_steps"]
    if name not in known and not (has_own_task(cfg) and name.startswith("eval/")):
        remedy = f"{suggest(name, known)} metrics: {', '.join(known)}".strip()
        yield Fault(METRIC, f"is not a metric that evaluations of task={task_name(cfg)} have", remedy, name)
    elif direction(cfg) is None:
        remedy = "set train.greater_is_better to true or false"
        yield Fault(METRIC, "does not say by itself whether larger values are better", remedy, name)
    elif (known_direction := known.get(name)) and direction(cfg) != known_direction:
        better = "larger" if known_direction == "maximize" else "smaller"
        remedy = "set it to null"
        yield Fault(
            "train.greater_is_better",
            f"contradicts {name}: {better} values are better",
            remedy,
            train["greater_is_better"],
        )
    if every is None or (last is not None and every >= last):
        problem = "runs are evaluated only at the end, so there is no choice"
        end = f" below train.max_steps={last}" if last is not None else ""
        yield Fault("train.eval_steps", problem, f"set it to a number{end}, or {METRIC}=null", every)
