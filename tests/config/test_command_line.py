"""Hydra's command line."""

from __future__ import annotations

import pytest

from runner.config import command_line
from runner.errors import ConfigError


def test_flags_may_stand_after_overrides_and_unknown_ones_are_refused_in_our_words():
    args = command_line.parse(["model=tiny", "-m", "lora.r=4,8"])
    assert args.multirun
    assert args.overrides == ["model=tiny", "lora.r=4,8"]
    with pytest.raises(ConfigError, match="--multi-run: no such flag\n    → did you mean '--multirun'"):
        command_line.parse(["--multi-run", "model=tiny"])
    with pytest.raises(ConfigError, match="cannot be read: unrecognized arguments: -x"):
        command_line.parse(["-x", "model=tiny"])


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (
            ["--learning_rate", "1e-4"],
            "--learning_rate: no such flag\n    → write optim.learning_rate=…, without dashes",
        ),
        (["--lora-dropout=0.1"], "--lora-dropout=0.1: no such flag\n    → write lora.lora_dropout=…, "),
        (["--seed", "1"], "write seed=…, without dashes"),
        (["--per_device_train_batch_size", "2"], "did you mean train.per_device_batch_size"),
        (["--report_to=none"], "runs are in MLflow; other trackers"),
        (["--nonsense"], "keys are written without dashes: key=value"),
    ],
)
def test_a_key_with_dashes_is_answered_with_how_it_is_written_here(words: list[str], remedy: str):
    with pytest.raises(ConfigError) as error:
        command_line.parse(["model=tiny", *words])
    assert remedy in str(error.value)
