"""Rows with images as a run has them: their tokens, their tensors, their cache, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import pictures

from runner.config import bind, schema
from runner.data import dataset, images, sources, vision
from runner.errors import DataError
from runner.models import tiny
from runner.tasks import sft

pytestmark = pictures.needs_transformers_5

SETTINGS = schema.DataSettings(max_length=256, packing=False, overlong="truncate", deduplicate=True, eval_fraction=0.3,
                               eval_rows=None, train_rows=None)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    folder = tmp_path_factory.mktemp("tiny_vision")
    source, tokenizer = pictures.loaded(pictures.write(folder, "idefics3"))
    return SimpleNamespace(folder=folder, source=source, tokenizer=tokenizer)


def load(rows: Path, tokenizer: Any, settings: schema.DataSettings = SETTINGS) -> dataset.Splits:
    node = bind.option("data/format", "messages")
    source = lambda: sources.local(path=str(rows), eval_path=None, documents="file")  # noqa: E731
    task = sft.sft(train_on="assistant")
    return dataset.load(source, bind.bind(node, "data.format"), task, tokenizer, settings, {"format": node})


def test_the_cache_keeps_where_the_images_are(made: Any, tmp_path: Path) -> None:
    rows = pictures.colour_rows(tmp_path, 12)
    splits = load(rows, made.tokenizer)
    assert len(splits.train) + len(splits.eval) == 12  # one question, of many images: no duplicates, no leak
    assert len(splits.eval) > 1
    (image,) = images.of_rows(splits.train.images, 0)
    assert Path(image["path"]).parent == tmp_path
    again = load(rows, made.tokenizer)
    assert again.digest == splits.digest
    assert torch.equal(*(first_pixels(each, made.tokenizer) for each in (splits, again)))


def first_pixels(splits: dataset.Splits, tokenizer: Any) -> torch.Tensor:
    return pictures.batches_of(splits.train, tokenizer, 2).step(0)[0]["pixel_values"]


def test_another_image_is_other_data(made: Any, tmp_path: Path) -> None:
    rows = pictures.colour_rows(tmp_path, 8)
    before = load(rows, made.tokenizer)
    pictures.square(tmp_path / "0.png", "blue", 24, 32)
    with pytest.raises(DataError, match=r"0\.png has changed since the rows were tokenised"):
        all_batches(before, made.tokenizer)
    after = load(rows, made.tokenizer)
    assert after.digest != before.digest
    assert len(all_batches(after, made.tokenizer)) == len(after.train) + len(after.eval)


def all_batches(splits: dataset.Splits, tokenizer: Any) -> list[Any]:
    return [
        batch for rows in (splits.train, splits.eval) for batch in pictures.batches_of(rows, tokenizer, 1).one_pass()
    ]


@pytest.mark.parametrize("name", ["gone.png", "text.png"])
def test_a_missing_or_broken_image_is_refused_with_its_line(made: Any, tmp_path: Path, name: str) -> None:
    rows = pictures.colour_rows(tmp_path, 4)
    (tmp_path / "text.png").write_text("no image")
    rows.write_text(rows.read_text().replace("2.png", name))
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{name}"):
        load(rows, made.tokenizer)


def test_an_answer_with_an_image_is_refused_with_its_line(made: Any, tmp_path: Path) -> None:
    rows = pictures.colour_rows(tmp_path, 4)
    lines = rows.read_text().splitlines()
    answer = {"role": "assistant", "content": [{"type": "image", "path": "0.png"}]}
    lines[1] = json.dumps({"messages": [{"role": "user", "content": "Draw."}, answer]})
    rows.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: message 2 is an answer with an image"):
        load(rows, made.tokenizer)


def test_a_model_for_text_refuses_images_with_the_line_and_the_way_out(tmp_path: Path, cache: Path) -> None:
    rows = pictures.colour_rows(tmp_path, 4)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:\d: the row has images, and this model reads text alone"
    ) as caught:
        load(rows, tiny.byte_tokenizer())
    assert "+data.format.ignore=[images]" in str(caught.value)


def test_a_row_with_images_is_never_cut(made: Any, tmp_path: Path) -> None:
    pictures.square(tmp_path / "a.png", "red")
    long = pictures.asked({"path": "a.png"}, "red " * 20)
    rows = [long, *(pictures.asked(None, f"word {number} " * 10) for number in range(9))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, report = pictures.tokenised(tmp_path / "rows.jsonl", made.tokenizer, max_length=80)
    assert (report.dropped, report.dropped_with_images, report.truncated) == (1, 1, 9)
    assert len(kept) == 9
    (tmp_path / "rows.jsonl").write_text(json.dumps(long))
    with pytest.raises(DataError, match=r"an image takes \d+ tokens on average, and rows with images are never cut"):
        pictures.tokenised(tmp_path / "rows.jsonl", made.tokenizer, max_length=80)


def test_the_token_of_an_image_in_a_text_is_refused(made: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(pictures.asked(None, "a red <image>")))
    with pytest.raises(DataError, match="1 times the token <image>, and 0 images"):
        pictures.tokenised(tmp_path / "rows.jsonl", made.tokenizer)


def test_the_processor_is_part_of_the_cache_key(made: Any, tmp_path: Path) -> None:
    assert vision.fingerprint(tiny.byte_tokenizer()) == ""
    before = vision.fingerprint(made.tokenizer)
    _, other = pictures.loaded(made.folder)
    assert vision.fingerprint(other) == before
    other.processor.image_processor.size = {"longest_edge": 48}
    assert vision.fingerprint(other) != before


def test_a_batch_without_images_has_no_tensors_of_images(made: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(pictures.asked(None, "none")))
    rows, _ = pictures.tokenised(tmp_path / "rows.jsonl", made.tokenizer)
    (batch,) = pictures.batches_of(rows, made.tokenizer, 1).one_pass()
    assert not set(vision.TENSORS) & set(batch)
