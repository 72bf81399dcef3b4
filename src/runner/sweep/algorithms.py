"""Options of the config group ``search``: sampler, objectives and early stopping of a search.

The samplers are Optuna's; Optuna is imported when a search starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from runner.config import eval_metrics
from runner.config.bind import bind
from runner.config.schema import COUNTABLE, Count, Seed, Text, Whole
from runner.errors import ConfigError, Fault, suggest
from runner.report import columns
from runner.sweep.asha import Rungs
from runner.tracking import machine

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Direction = Literal["minimize", "maximize"]

ON_CUDA, ON_CPU = ("memory/peak_allocated_gib", "memory/peak_reserved_gib"), ("memory/peak_rss_gib",)
"""Metrics that runs log only on one kind of device."""
OF_ALL = (
    "eval/loss", "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/epoch",
    "train/tokens_per_second", "train/step_seconds", "train/data_wait_fraction", "train/mfu", *ON_CUDA, *ON_CPU,
    "training seconds",
)  # fmt: skip
"""Metrics that runs of every task log."""


@dataclass(frozen=True)
class Search:
    """Settings of a search. (``search=grid`` is not a search: it runs all combinations.)"""

    kind: str
    trials: int
    space: dict[str, str]
    """Key → values in Hydra's sweep syntax."""
    objectives: dict[str, Direction]
    """Metric → minimize or maximize."""
    at_once: int | None
    sampler: Callable[[int], BaseSampler]
    """Number of existing trials → Optuna sampler."""
    rungs: Rungs | None
    """Steps at which runs are compared and paused; None: every run is trained to its end."""


def grid() -> None:
    """All combinations, created by Hydra."""
    return


def random(
    *,
    trials: Count,
    space: dict[str, Text] | None,
    objective: Text | list[Text],
    direction: Direction | list[Direction],
    at_once: Count | None,
    seed: Seed,
) -> Search:
    """Random search (Bergstra and Bengio 2012)."""
    return Search("random", trials, dict(space or {}), _paired(objective, direction), at_once, _random(seed), None)


def tpe(
    *,
    trials: Count,
    space: dict[str, Text] | None,
    objective: Text | list[Text],
    direction: Direction | list[Direction],
    at_once: Count | None,
    seed: Seed,
    startup_trials: Whole,
) -> Search:
    """Tree-structured Parzen estimator (Bergstra et al. 2011); active runs count as bad ones (constant liar)."""
    sampler = _tpe(seed, startup_trials)
    return Search("tpe", trials, dict(space or {}), _paired(objective, direction), at_once, sampler, None)


def asha(
    *,
    trials: Count,
    space: dict[str, Text] | None,
    objective: Text,
    direction: Direction,
    at_once: Count | None,
    seed: Seed,
    sampler: Literal["tpe", "random"],
    startup_trials: Whole,
    min_steps: Count,
    reduction_factor: Annotated[int, Ge(2), COUNTABLE],
) -> Search:
    """Asynchronous successive halving: at each rung the worse runs pause; they resume if they rank better later."""
    proposer = _tpe(seed, startup_trials) if sampler == "tpe" else _random(seed)
    rungs = Rungs(min_steps, reduction_factor, objective, is_larger_better=direction == "maximize")
    return Search("asha", trials, dict(space or {}), {objective: direction}, at_once, proposer, rungs)


def check_random(*, objective: str | list[str], direction: str | list[str], **_: Any) -> Iterator[Fault]:
    yield from _objective_faults(objective, direction)


check_tpe = check_random


def check_asha(*, objective: str, direction: str, **_: Any) -> Iterator[Fault]:
    yield from _objective_faults(objective, direction)
    if objective in OF_ALL and not objective.startswith("eval/"):
        remedy = "use a metric whose name begins with eval/, such as eval/loss"
        yield Fault("objective", "is logged only at the end of a run, but asha compares runs during training", remedy)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Check a search together with the rest of the configuration."""
    node, launcher = cfg["search"], cfg["launcher"]
    if "trials" in node:
        yield from _metric_faults(node, cfg)
    if "trials" in node and node["at_once"] is None and launcher.get("array_parallelism", 1) is None:
        problem, remedy = "a search on Slurm needs a limit of active runs", "set it, for example search.at_once=8"
        yield Fault("search.at_once", problem, remedy)
    if "trials" in node and launcher.get("cluster") == "debug":
        remedy = "set launcher.cluster=local, or launcher=local"
        yield Fault("launcher.cluster", "one process cannot propose and train the runs of a search", remedy, "debug")
    if "min_steps" in node:
        yield from _rung_faults(node, cfg["train"])


def refuse_unlogged(search: Search, cfg: Mapping[str, Any]) -> None:
    """Refuse a memory metric of the other device type (CPU or GPU). Not checked on Slurm: nodes may have GPUs.

    Raises:
        ConfigError: contains the metric to use instead.
    """
    if "cluster" in cfg["launcher"]:
        return
    has_gpu = machine.has_cuda()
    logged, unlogged = (ON_CUDA, ON_CPU) if has_gpu else (ON_CPU, ON_CUDA)
    problem = f"is not logged on this machine: torch finds {'a' if has_gpu else 'no'} GPU"
    remedy = f"use {' or '.join(logged)}"
    if faults := [Fault("search.objective", problem, remedy, name) for name in search.objectives if name in unlogged]:
        raise ConfigError(*faults)


def _rung_faults(node: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[Fault]:
    min_steps, every = node["min_steps"], train["eval_steps"]
    if every is None:
        problem = "asha compares evaluations during training, but runs are evaluated only at the end"
        yield Fault("train.eval_steps", problem, f"set it to a divisor of search.min_steps={min_steps}", every)
    elif min_steps % every:
        problem = f"is not a multiple of train.eval_steps={every}, so there is no evaluation at this step"
        yield Fault("search.min_steps", problem, f"set it to a multiple, for example {every}", min_steps)
    elif train["max_steps"] is not None and min_steps >= train["max_steps"]:
        problem = f"runs end at train.max_steps={train['max_steps']}: no run would be paused"
        yield Fault("search.min_steps", problem, "set it to a fraction of train.max_steps", min_steps)


def _objective_faults(objective: str | list[str], direction: str | list[str]) -> Iterator[Fault]:
    names, directions = _listed(objective), _listed(direction)
    if len(names) != len(directions) or len(set(names)) != len(names) or not names:
        problem = f"{len(names)} objectives and {len(directions)} directions"
        yield Fault("direction", problem, "list each objective once, with one direction each", direction)


def logged(cfg: Mapping[str, Any]) -> dict[str, Direction | None]:
    """Every metric that runs of this configuration log → its direction; None: neither is better by itself."""
    measures, task = eval_metrics.measures(cfg), bind(cfg["task"], "task")()
    prepares = ["prepare_fraction"] if task.prepare is not None else []
    trained = (f"train/{name}" for name in (*task.train_metrics, *prepares))
    of_training = {name: measures.get(name.replace("train/", "eval/", 1)) for name in trained}
    rated = {name: _by_name(name) if columns.is_rated(name) else None for name in OF_ALL}
    return {**rated, **of_training, **measures}


def _by_name(name: str) -> Direction:
    return "maximize" if columns.by_name(name).is_larger_better else "minimize"


def _metric_faults(node: Mapping[str, Any], cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Objectives that runs of this task do not log, and directions that contradict the metric."""
    known = logged(cfg)
    for name, direction in _paired(node["objective"], node["direction"]).items():
        if name not in known and not (eval_metrics.has_own_task(cfg) and name.startswith("eval/")):
            allowed = f"{suggest(name, known)} metrics: {', '.join(known)}".strip()
            problem = f"is not a metric that runs of task={eval_metrics.task_name(cfg)} log"
            yield Fault("search.objective", problem, allowed, name)
        better = known.get(name, _by_name(name) if columns.is_rated(name) else None)
        if better and direction != better:
            problem = f"makes {name} worse: {'larger' if better == 'maximize' else 'smaller'} values are better"
            yield Fault("search.direction", problem, f"set search.direction={better}", direction)


def _paired(objective: str | list[str], direction: Direction | list[Direction]) -> dict[str, Direction]:
    directions: list[Direction] = [direction] if isinstance(direction, str) else list(direction)
    return dict(zip(_listed(objective), directions, strict=True))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _random(seed: int) -> Callable[[int], BaseSampler]:
    def create(trials: int) -> BaseSampler:
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=seed + trials)  # a resumed search must not repeat its first proposals

    return create


def _tpe(seed: int, startup_trials: int) -> Callable[[int], BaseSampler]:
    def create(trials: int) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed + trials, n_startup_trials=startup_trials, constant_liar=True, multivariate=False)

    return create
