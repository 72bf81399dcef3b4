"""Mixtures: shares from weights, rows of several sources as one, and prompts that no other source may hold out."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fixtures.documents import batches, load, own_cache, talk, texts
from fixtures.mixtures import mixed

from runner.data import dataset, mixture
from runner.errors import DataError


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ({"a": None, "b": None}, {"a": 0.25, "b": 0.75}),
        ({"a": 0.4, "b": None}, {"a": 0.4, "b": 0.6}),
        ({"a": 2.0, "b": 6.0}, {"a": 0.25, "b": 0.75}),
        ({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 1.0}),
        ({"a": 0.4, "b": None, "c": None}, {"a": 0.4, "b": 0.45, "c": 0.15}),
    ],
)
def test_a_weight_is_a_share_and_the_others_share_the_rest(weights: dict[str, Any], shares: dict[str, float]) -> None:
    assert mixture.shares(weights, {"a": 100, "b": 300, "c": 100}) == pytest.approx(shares)


def faults(*weights: float | None) -> list[str]:
    sources = {f"s{number}": {"weight": weight} for number, weight in enumerate(weights)}
    return [fault.problem for fault in mixture.check_mix(sources=sources, max_repeats=4)]


def test_weights_that_leave_nothing_are_refused() -> None:
    assert faults(0.3, None) == faults(0.3, 0.9) == faults(None) == []
    assert "a mixture needs sources" in faults()
    assert "all weights are 0" in faults(0, 0.0)
    assert "sum up to 1.2" in faults(0.7, 0.5, None)[0]


def test_each_label_has_the_number_of_its_source() -> None:
    sources = {"a": load(map(talk, range(30)), train_on="all"), "b": load(map(talk, range(100, 190)), train_on="all")}
    splits = mixed(sources)
    counts = np.zeros(2, dtype=np.int64)
    for batch in batches(splits.train, packing=True, max_length=96).one_pass():
        counts += np.bincount(batch["source_at"].numpy(), minlength=2)
    assert counts.tolist() == [each.report.train_trained_tokens for each in sources.values()]


def test_no_source_trains_on_a_prompt_that_another_holds_out() -> None:
    sources = {"a": load(map(talk, range(60))), "b": load(map(talk, range(60)), eval_fraction=0.6)}
    splits = mixed(sources)
    held_out = {text for each in sources.values() for text in texts(each.eval)}
    trained = {texts(splits.train)[row] for row in splits.train.packs.rows.tolist()}
    assert not trained & held_out
    assert splits.sources["a"].report.leaked > 0
    assert splits.sources["b"].report.leaked == 0
    assert len(splits.sources["a"].train.packs.rows) == splits.sources["a"].report.train_rows
    passed = list(batches(splits.train, packing=False, max_length=96).one_pass())
    assert sum(batch["documents"] for batch in passed) == splits.report.train_rows == len(trained) * 2
    assert sum(batch["trained"] for batch in passed) == splits.report.train_trained_tokens


def test_a_set_to_evaluate_on_takes_its_prompts_out_of_training() -> None:
    data = load(map(talk, range(40)))
    evals = {"law": load(map(talk, range(10)), trains=False)}
    splits = mixture.join(mixture.ALONE, {"": data}, evals)
    assert (splits.name, splits.digest, splits.sources) == (data.name, data.digest, {})
    assert [part.weight for part in splits.eval.parts] == [1.0, 0.0]
    assert splits.report.leaked > 0
    with pytest.raises(DataError, match=r"all .* training rows have prompts that are held out elsewhere"):
        mixture.join(mixture.ALONE, {"": data}, {"law": load(map(talk, range(40)), trains=False)})


def test_data_that_are_no_mixture_stay_as_they_are() -> None:
    data = load(map(talk, range(40)))
    splits = mixture.join(mixture.ALONE, {"": data}, {})
    assert splits.train is data.train
    assert splits.eval is data.eval
    assert splits.report == data.report


def test_a_weight_of_zero_is_evaluated_and_not_trained() -> None:
    sources = {"a": load(map(talk, range(30))), "b": load(map(talk, range(100, 190)))}
    splits = mixed(sources, a=0.0)
    assert [part.name for part in splits.train.parts] == ["b"]
    assert [part.name for part in splits.eval.parts] == ["a", "b"]
    assert splits.sources["a"].report.train_rows == 0


def test_other_weights_tokenise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[talk(number) for number in numbers] for numbers in (range(30), range(100, 190))]
    before = mixed({"a": load(rows[0]), "b": load(rows[1])}, a=0.1)
    monkeypatch.setattr(dataset, "tokenise", None)
    after = mixed({"a": load(rows[0]), "b": load(rows[1])}, a=0.3)
    assert (before.weights["a"], after.weights["a"]) == (0.1, 0.3)
    assert before.digest == after.digest
