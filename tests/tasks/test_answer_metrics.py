"""Metrics of answers, against their reference implementations."""

from __future__ import annotations

import pytest

from runner.tasks import answer_metrics


def test_the_metrics_are_those_of_the_reference_implementations():
    """ROUGE-L of rouge-score 0.1.2, exact match and F1 of the script of SQuAD 1.1, on the same texts."""
    texts = ["The cat sat on the mat.", "a dog", "Yes", "", "it is 12 km north of the old town"]
    references = ["the cat is on a mat", "Dog!", "no", "nothing", "12 km north of town, it is"]
    given = {"completions": texts, "reference": references}
    rouge = [2 / 3, 2 / 3, 0.0, 0.0, 0.625]
    assert answer_metrics.rouge_l(**given) == pytest.approx(rouge, abs=1e-6)
    assert answer_metrics.exact_match(**given) == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert answer_metrics.f1(**given) == pytest.approx([0.75, 1.0, 0.0, 0.0, 14 / 15], abs=1e-6)
    assert answer_metrics.f1(completions=["x"], reference=[None]) == [None]
