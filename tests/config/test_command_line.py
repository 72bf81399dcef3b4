"""Hydra's command line."""

from __future__ import annotations

import pytest

from runner.config import command_line
from runner.errors import ConfigError


def test_flags_may_stand_after_overrides_and_unknown_ones_are_refused_in_our_words():
    args = command_line.parse(["model=tiny", "-m", "lora.r=4,8"])
    assert args.multirun
    assert args.overrides == ["model=tiny", "lora.r=4,8"]
    with pytest.raises(ConfigError, match="cannot be read: unrecognized arguments: --multi-run"):
        command_line.parse(["--multi-run", "model=tiny"])
