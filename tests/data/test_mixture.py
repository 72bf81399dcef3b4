"""Mixtures: shares from weights, rows of several sources as one, and prompts that no other source may hold out."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fixtures.documents import batches, load, own_cache, talk, texts

from runner.data import dataset, joined, mixture
from runner.data.dataset import Splits
from runner.data.mixture import Mixture
from runner.data.packing import IGNORED, Part
from runner.errors import DataError


def mixed(sources: dict[str, Splits], evals: dict[str, Splits] | None = None, **weights: float | None) -> Splits:
    return mixture.join(Mixture({**dict.fromkeys(sources), **weights}, 4.0), sources, evals or {})


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


def test_rows_of_several_sources_are_their_rows() -> None:
    sources = {"a": load(map(talk, range(30))), "b": load(map(talk, range(100, 190)))}
    splits = mixed(sources, a=0.5)
    assert texts(splits.train) == texts(sources["a"].train) + texts(sources["b"].train)
    assert splits.train.parts == (Part("a", len(sources["a"].train), 0.5), Part("b", len(sources["b"].train), 0.5))
    counts = np.concatenate([each.train.labels_per_row for each in sources.values()])
    assert splits.train.labels_per_row.tolist() == counts.tolist()
    assert splits.report.train_tokens == sum(each.report.train_tokens for each in sources.values())
    made = batches(splits.train, packing=True, max_length=96)
    names = {name for batch in made.one_pass() for name in batch["sources"]}
    assert names == {"a", "b"}
    for batch in made.one_pass():
        ids = batch["labels"].flatten()[batch["trained_at"]]
        assert len(batch["source_at"]) == len(ids) == batch["trained"]


def test_each_label_has_the_number_of_its_source() -> None:
    sources = {"a": load(map(talk, range(30)), train_on="all"), "b": load(map(talk, range(100, 190)), train_on="all")}
    splits = mixed(sources)
    counts = np.zeros(2, dtype=np.int64)
    for batch in batches(splits.train, packing=True, max_length=96).one_pass():
        counts += np.bincount(batch["source_at"].numpy(), minlength=2)
    assert counts.tolist() == [each.report.train_trained_tokens for each in sources.values()]


def test_rows_with_weights_and_rows_without_are_joined() -> None:
    heavy = [{**talk(number), "weight": 2.0} for number in range(30)]
    splits = mixed({"a": load(map(talk, range(100, 130))), "b": load(heavy)})
    assert splits.train.weights is not None
    first, last = splits.train.weights_of(0), splits.train.weights_of(len(splits.train) - 1)
    assert (set(first.tolist()), 2.0 in last.tolist()) == ({1.0}, True)


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


def test_a_chain_is_read_slice_by_slice() -> None:
    chain = joined.Chain([np.arange(4), np.arange(4, 9)])
    assert [chain[slice(a, b)].tolist() for a, b in ((0, 4), (1, 3), (4, 9), (8, 9))] == [
        [0, 1, 2, 3], [1, 2], [4, 5, 6, 7, 8], [8],
    ]  # fmt: skip
    assert np.asarray(chain).tolist() == list(range(9))
    assert len(chain) == 9
    assert IGNORED not in np.asarray(chain)
