"""Schedules against transformers' own, one step and one total further on (see the module's docstring)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from fixtures import versions

from runner.config.bind import bind, find_faults
from runner.errors import ConfigError
from runner.train import schedules

OPTIONS = sorted(Path(__file__).parents[2].glob("conf/schedule/*.yaml"))
TOTAL = 40


def theirs(name: str, **options: object) -> list[float]:
    """The factors of transformers' schedule ``name`` for our steps 0 … TOTAL - 1."""
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(transformers, name)(optimizer, **options)
    return [schedule.lr_lambdas[0](step + 1) for step in range(TOTAL)]


def ours(function, **keys: object) -> list[float]:
    return [function(step, TOTAL, **{"warmup_steps": None, "warmup_ratio": 0.0, **keys}) for step in range(TOTAL)]


@pytest.mark.parametrize("warm", [0, 1, 7, TOTAL])
def test_equals_transformers(warm: int) -> None:
    span = {"num_warmup_steps": warm, "num_training_steps": TOTAL + 1}
    steps = {"warmup_steps": warm}
    assert ours(schedules.cosine, min_ratio=0.0, **steps) == pytest.approx(
        theirs("get_cosine_schedule_with_warmup", **span)
    )
    assert ours(schedules.linear, min_ratio=0.0, **steps) == pytest.approx(
        theirs("get_linear_schedule_with_warmup", **span)
    )
    assert ours(schedules.constant, **steps) == pytest.approx(
        theirs("get_constant_schedule_with_warmup", num_warmup_steps=warm)
    )


@versions.transformers_5
def test_cosine_with_a_floor_equals_transformers_after_the_warmup() -> None:
    reference = theirs(
        "get_cosine_with_min_lr_schedule_with_warmup",
        num_warmup_steps=7,
        num_training_steps=TOTAL + 1,
        min_lr_rate=0.1,
    )
    assert ours(schedules.cosine, warmup_steps=7, min_ratio=0.1)[7:] == pytest.approx(reference[7:])


@versions.transformers_5
def test_wsd_equals_transformers_plateau_and_linear_decay() -> None:
    reference = theirs(
        "get_wsd_schedule",
        num_warmup_steps=5,
        num_stable_steps=TOTAL - 5 - 8,
        num_decay_steps=8 + 1,
        decay_type="linear",
    )
    assert ours(schedules.wsd, warmup_steps=5, decay_ratio=0.2, min_ratio=0.0) == pytest.approx(reference)


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_step_learns_and_the_peak_is_reached(path: Path) -> None:
    schedule = bind(yaml.safe_load(path.read_text()), "schedule")
    factors = [schedule(step, TOTAL) for step in range(TOTAL)]
    assert min(factors) > 0
    assert max(factors) == 1.0
    assert 0 < schedule(0, 1) <= 1, "a run of one step learns"


def test_the_floor_is_where_it_ends() -> None:
    for function, more in ((schedules.cosine, {}), (schedules.linear, {}), (schedules.wsd, {"decay_ratio": 0.5})):
        last = ours(function, warmup_steps=2, min_ratio=0.1, **more)[-1]
        assert 0.1 < last < 0.15


def test_warmup_counts_steps() -> None:
    assert schedules.warmup(100, None, 0.05) == 5
    assert schedules.warmup(101, None, 0.05) == 6, "rounded up, as transformers does"
    assert schedules.warmup(100, 0, 0.0) == 0
    with pytest.raises(ConfigError, match=r"longer than the run \(10 steps\)"):
        schedules.warmup(10, 11, 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup_steps": 5}, "cannot be combined with warmup_ratio="),
        ({"warmup_ratio": 1.0}, "< 1"),
        ({"warmup_ratio": -0.1}, ">= 0"),
        ({"min_ratio": 2}, "<= 1"),
        ({"warmup": 5}, "warmup_"),
        ({"decay_ratio": 0.99}, "more than the whole run"),
    ],
)
def test_faults_are_refused(changes: dict, said: str) -> None:
    node = yaml.safe_load((OPTIONS[0].parent / "wsd.yaml").read_text())
    [fault] = find_faults({**node, **changes}, "schedule")
    assert said in str(fault)
    assert str(fault).startswith(f"schedule.{next(iter(changes))}=")


def test_a_decay_that_does_not_fit_is_refused_at_run_time() -> None:
    with pytest.raises(ConfigError, match="exceed the 10 steps of the run"):
        schedules.wsd(0, 10, warmup_steps=8, warmup_ratio=0.0, decay_ratio=0.5, min_ratio=0.0)
