"""Answers with the prompt of another row."""

from __future__ import annotations

import numpy as np

from runner.data.packing import Rows
from runner.tasks import kto_kl


def test_no_answer_meets_its_own_prompt() -> None:
    rows = Rows.of([(np.array([n, n, 100 + n]), np.array([-100, -100, 100 + n])) for n in range(3)])
    ids, labels = kto_kl.mix(rows, 1, 0, 8)
    assert ids.tolist() == [1, 1, 100]
    assert labels.tolist() == [-100, -100, 100]
    assert kto_kl.mix(rows, 1, 0, 2)[0].tolist() == [1, 1]
