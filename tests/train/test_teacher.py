"""Whether a teacher has the tokens of its student."""

from __future__ import annotations

import pytest

from runner.errors import ConfigError
from runner.train import teacher


def test_tokens_are_compared_one_by_one_up_to_the_common_size() -> None:
    ours = {"a": 0, "b": 1, "c": 2}
    teacher._refuse_other_tokens(ours, {**ours, "<pad>": 3}, 3)
    with pytest.raises(ConfigError, match=r"2 of 3 differ \(1 is 'b' here and 'c' there, 2 is 'c'"):
        teacher._refuse_other_tokens(ours, {"a": 0, "c": 1, "b": 2}, 3)
    with pytest.raises(ConfigError, match="2 is 'c' here and None there"):
        teacher._refuse_other_tokens(ours, {"a": 0, "b": 1}, 3)
