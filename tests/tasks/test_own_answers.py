"""In which steps the model answers itself, and where its last answer begins."""

from __future__ import annotations

import numpy as np

from runner.tasks import own_answers
from runner.train import loop


def test_the_share_of_the_steps_and_the_prompt_of_the_last_answer() -> None:
    half = own_answers.OwnAnswers(0.5, 8, 1.0)
    due = [half.are_due(loop.derived_seed(0, step)) for step in range(400)]
    assert 160 < sum(due) < 240
    assert not own_answers.OwnAnswers(0.0, 8, 1.0).are_due(7)
    assert own_answers.OwnAnswers(1.0, 8, 1.0).are_due(7)
    assert own_answers.last_answer(np.array([-100, -100, 5, 6, -100, -100, 7, 8, -100])) == 6
