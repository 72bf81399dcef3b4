"""Rows that are read from the Hub as they are needed."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures import versions
from fixtures.chat_tokenizer import build
from fixtures.documents import SETTINGS, load, own_cache, read_messages, talk, texts
from fixtures.fake_hub import COMMIT, Hub, hub

from runner.config import schema
from runner.config.schema import DataSettings
from runner.data import dataset, sources, streaming
from runner.data.dataset import Splits
from runner.data.readers import Place, Row
from runner.data.sources import Records, Source
from runner.errors import DataError
from runner.tasks import sft

LIMITS = {"train_rows": 50, "eval_rows": 10}


@pytest.fixture
def talks(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with a data set of three files of rows, 40 each."""
    import datasets
    from huggingface_hub import constants

    for name, value in {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_CACHE": tmp_path / "sets",
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    rows = ["\n".join(json.dumps(talk(40 * file + number)) for number in range(40)) for file in range(3)]
    hub.datasets["me/talks"] = {f"data/train-0000{file}-of-00003.jsonl": rows[file].encode() for file in range(3)}
    return hub


def stream(**changes: object) -> Source:
    keys = {"path": "me/talks", "name": None, "split": "train", "eval_split": None, "revision": None, **changes}
    return sources.hub(**keys, streaming=True)


def tokenised(source: Source, **changes: object) -> Splits:
    settings = DataSettings(**{**SETTINGS, **LIMITS, **changes})
    task, identity = sft.sft(train_on="assistant"), {"format": {"_target_": "messages"}, "task": {}}
    return dataset.load(lambda: source, read_messages, task, build("llama3"), settings, identity)


@versions.datasets_4
def test_only_the_files_of_the_first_rows_are_fetched(talks: Hub) -> None:
    splits = tokenised(stream(revision="main"))
    assert (splits.report.rows_read, splits.revision, splits.is_streamed) == (60, COMMIT, True)
    assert set(talks.fetched) == {f"data/train-0000{file}-of-00003.jsonl" for file in (0, 1)}
    downloaded = load(map(talk, range(60)), **LIMITS)
    assert (texts(splits.train), texts(splits.eval)) == (texts(downloaded.train), texts(downloaded.eval))
    talks.fetched.clear()
    assert texts(tokenised(stream()).train) == texts(splits.train)
    assert not talks.fetched, "the tokens are in the cache"


def test_a_stream_offline_needs_its_tokens_in_the_cache() -> None:
    with pytest.raises(DataError, match=r"data\.streaming=True: .* HF_HUB_OFFLINE is set"):
        tokenised(stream())


def test_each_row_of_a_stream_is_read_once(tmp_path: Path) -> None:
    asked = list[int]()

    def rows() -> Iterator[tuple[Place, Row]]:
        for number in range(1, 1000):
            asked.append(number)
            yield Place("there", number, "row"), {"number": number, "bytes": b"1"}

    records, settings = Records(rows), DataSettings(**{**SETTINGS, **LIMITS})
    source = Source("", records, None, "", "", is_streamed=True)
    kept = streaming.kept_aside(source, settings, tmp_path, trains=True)
    assert not asked
    passes = [[(str(place), row["number"]) for place, row in kept.train] for _ in range(2)]
    assert passes == [[(f"there, row {number}", number) for number in range(1, 61)]] * 2
    assert asked == list(range(1, 61))
    evaluated = streaming.kept_aside(source, settings, tmp_path, trains=False)
    assert len(list(evaluated.train)) == 10
    both = streaming.kept_aside(replace(source, eval=records), settings, tmp_path, trains=True)
    assert [len(list(each)) for each in (both.train, both.eval or ())] == [50, 10]
    assert streaming.kept_aside(Source("", records, None, "", ""), settings, tmp_path, trains=True).train is records


def test_a_stream_without_a_limit_is_refused() -> None:
    node = {"streaming": True, "train_rows": None, "eval_rows": 4}
    [fault] = schema.unlimited_stream(node, "train_rows", "data.sources.web")
    assert (fault.key, fault.value) == ("data.sources.web.train_rows", None)
    assert "data.sources.web.train_rows=10000" in fault.remedy
    assert not list(schema.unlimited_stream(node, "eval_rows"))
    assert not list(schema.unlimited_stream({**node, "streaming": False}, "train_rows"))
