"""Options of the group ``search``: who proposes the runs of a sweep, what is to be improved, what is given up.

Optuna proposes; nothing of it is imported before a search begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from runner.config.schema import Count, Seed
from runner.errors import ConfigError, Fault, suggest
from runner.sweep.asha import Rungs
from runner.tracking import machine

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

Direction = Literal["minimize", "maximize"]

ON_CUDA, ON_CPU = ("memory/peak_allocated_gib", "memory/peak_reserved_gib"), ("memory/peak_rss_gib",)
"""Metrics that runs log on one kind of device alone."""
METRICS = (
    "eval/loss", "eval/perplexity", "eval/token_accuracy", "train/loss", "train/grad_norm", "train/learning_rate",
    "train/tokens", "train/epoch", "train/tokens_per_second", "train/step_seconds", "train/data_wait_fraction",
    "train/mfu", *ON_CUDA, *ON_CPU, "training seconds",
)  # fmt: skip
"""What runs say of themselves, so that an objective which is never logged is refused before the first of them."""


@dataclass(frozen=True)
class Search:
    """How the runs of a sweep are proposed; ``grid`` proposes nothing: all combinations are run."""

    kind: str
    trials: int
    space: dict[str, str]
    """Key → values in Hydra's sweep syntax."""
    objectives: dict[str, Direction]
    """Metric → minimize or maximize."""
    at_once: int | None
    sampler: Callable[[int], BaseSampler]
    """Number of trials so far → who proposes the next."""
    rungs: Rungs | None
    """Where runs are compared on their way; None: nowhere."""


def grid() -> None:
    """All combinations, as Hydra makes them."""
    return


def random(
    *,
    trials: Count,
    space: dict[str, str] | None,
    objective: str | list[str],
    direction: Direction | list[Direction],
    at_once: Count | None,
    seed: Seed,
) -> Search:
    """Independent draws from the space (Bergstra and Bengio 2012)."""
    return Search("random", trials, dict(space or {}), _paired(objective, direction), at_once, _random(seed), None)


def tpe(
    *,
    trials: Count,
    space: dict[str, str] | None,
    objective: str | list[str],
    direction: Direction | list[Direction],
    at_once: Count | None,
    seed: Seed,
    startup_trials: Annotated[int, Ge(0)],
) -> Search:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), told of runs that have not ended yet as of bad ones."""
    sampler = _tpe(seed, startup_trials)
    return Search("tpe", trials, dict(space or {}), _paired(objective, direction), at_once, sampler, None)


def asha(
    *,
    trials: Count,
    space: dict[str, str] | None,
    objective: str,
    direction: Direction,
    at_once: Count | None,
    seed: Seed,
    sampler: Literal["tpe", "random"],
    startup_trials: Annotated[int, Ge(0)],
    min_steps: Count,
    reduction_factor: Annotated[int, Ge(2)],
) -> Search:
    """Asynchronous successive halving: what is behind at a rung pauses, and goes on if it comes to be ahead."""
    proposer = _tpe(seed, startup_trials) if sampler == "tpe" else _random(seed)
    rungs = Rungs(min_steps, reduction_factor, objective, is_larger_better=direction == "maximize")
    return Search("asha", trials, dict(space or {}), {objective: direction}, at_once, proposer, rungs)


def check_random(*, objective: str | list[str], direction: str | list[str], **_: Any) -> Iterator[Fault]:
    yield from _objective_faults(objective, direction)


check_tpe = check_random


def check_asha(*, objective: str, direction: str, **_: Any) -> Iterator[Fault]:
    yield from _objective_faults(objective, direction)
    if objective in METRICS and not objective.startswith("eval/"):
        remedy = f"one of {', '.join(name for name in METRICS if name.startswith('eval/'))}"
        yield Fault("objective", "is not known before the end of a run, and asha compares runs on their way", remedy)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of a search together with the rest of the configuration."""
    node, launcher = cfg["search"], cfg["launcher"]
    if "trials" in node and node["at_once"] is None and launcher.get("array_parallelism", 1) is None:
        problem, remedy = "a search on Slurm goes on as runs end", "say how many may be at work, as search.at_once=8"
        yield Fault("search.at_once", problem, remedy)
    if "trials" in node and launcher.get("cluster") == "debug":
        remedy = "set launcher.cluster=local, or launcher=local"
        yield Fault("launcher.cluster", "one process cannot propose runs and train them", remedy, "debug")
    if "min_steps" in node:
        yield from _rung_faults(node, cfg["train"])


def refuse_unlogged(wanted: Search, cfg: Mapping[str, Any]) -> None:
    """Refuse an objective that no run on this machine logs; what another one logs cannot be known here.

    Raises:
        ConfigError: with what there is instead.
    """
    if "cluster" in cfg["launcher"]:
        return
    has_gpu = machine.has_cuda()
    problem = f"no run here logs this: torch finds {'a' if has_gpu else 'no'} GPU"
    remedy = f"there is {', '.join(ON_CUDA if has_gpu else ON_CPU)}"
    elsewhere = ON_CPU if has_gpu else ON_CUDA
    if faults := [Fault("search.objective", problem, remedy, each) for each in wanted.objectives if each in elsewhere]:
        raise ConfigError(*faults)


def _rung_faults(node: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[Fault]:
    wanted, every = node["min_steps"], train["eval_steps"]
    if every is None:
        problem, remedy = "asha compares runs on their way, and they are evaluated only at the end", "set it"
        yield Fault("train.eval_steps", problem, f"{remedy}, to a divisor of search.min_steps={wanted}", every)
    elif wanted % every:
        remedy = f"set one of them so that search.min_steps is a multiple, as search.min_steps={every}"
        yield Fault("search.min_steps", f"runs are evaluated every train.eval_steps={every} steps", remedy, wanted)
    elif train["max_steps"] is not None and wanted >= train["max_steps"]:
        problem = f"runs end at train.max_steps={train['max_steps']}: none would be given up"
        yield Fault("search.min_steps", problem, "set it to a fraction of that", wanted)


def _objective_faults(objective: str | list[str], direction: str | list[str]) -> Iterator[Fault]:
    names, directions = _listed(objective), _listed(direction)
    for name in names:
        if name not in METRICS:
            allowed = f"{suggest(name, METRICS)} metrics: {', '.join(METRICS)}".strip()
            yield Fault("objective", "no run logs this", allowed, name)
    if len(names) != len(directions) or len(set(names)) != len(names) or not names:
        problem = f"{len(names)} objectives and {len(directions)} directions"
        yield Fault("direction", problem, "give each objective, once, a direction of its own", direction)


def _paired(objective: str | list[str], direction: Direction | list[Direction]) -> dict[str, Direction]:
    directions: list[Direction] = [direction] if isinstance(direction, str) else list(direction)
    return dict(zip(_listed(objective), directions, strict=True))


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _random(seed: int) -> Callable[[int], BaseSampler]:
    def make(before: int) -> BaseSampler:
        from optuna.samplers import RandomSampler

        return RandomSampler(seed=seed + before)  # one that goes on must not propose the first ones again

    return make


def _tpe(seed: int, startup_trials: int) -> Callable[[int], BaseSampler]:
    def make(before: int) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed + before, n_startup_trials=startup_trials, constant_liar=True, multivariate=False)

    return make
