"""Each family that reads images is computed as plain transformers computes it from what its processor gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures import pictures
from PIL import Image

from runner.errors import ConfigError
from runner.models import lora, pretrained, vision
from runner.models.kernels.base_model import IMAGE_FAMILIES
from runner.models.quantization import none
from runner.tasks.task import token_loss

pytestmark = pictures.needs_transformers_5

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "bias": "none", "use_dora": False,
        "use_rslora": False, "init_lora_weights": "gaussian"}  # fmt: skip


@pytest.fixture(scope="module", params=pictures.FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    """A tiny model of a family with its processor, and rows with no image, one, and two of different sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    source, tokenizer = pictures.loaded(pictures.write(folder / "model", request.param))
    wide = pictures.square(folder / "wide.png", "blue", 90, 40)
    two = pictures.asked({"path": "small.png"}, "red and blue", "Which is this?")
    two["messages"][0]["content"].append({"type": "image", "path": str(wide)})
    pictures.square(folder / "small.png", "red", 20, 30)
    rows = [pictures.asked(None, "none"), pictures.asked({"path": "small.png"}, "red"), two]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = pretrained.load(source, none.none(), "cpu").eval()
    return SimpleNamespace(folder=folder, source=source, tokenizer=tokenizer, rows=rows, model=model)


def plain_losses(made: Any) -> tuple[list[list[int]], list[float]]:
    """(tokens, summed loss) of each row by transformers alone: its processor, its model, and its loss."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(made.folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(made.folder / "model", dtype=torch.float32).eval()
    ids, losses = [], []
    for row in made.rows:
        talk = [{**turn, "content": _parts(turn["content"])} for turn in row["messages"]]
        text = processor.apply_chat_template(talk, tokenize=False)
        found = [part["path"] for part in talk[0]["content"] if part["type"] == "image"]
        images = [Image.open(made.folder / path).convert("RGB") for path in found]
        inputs = processor(
            text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
        )
        answer = processor.tokenizer(row["messages"][1]["content"] + "<|im_end|>")["input_ids"]
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, -1 - len(answer) : -1] = torch.tensor(answer)  # a newline ends the row
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
        ids.append(inputs["input_ids"][0].tolist())
        losses.append(float(loss) * len(answer))
    return ids, losses


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


@torch.no_grad()
def test_rows_and_losses_are_those_of_transformers(made: Any) -> None:
    rows, report = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    ids, losses = plain_losses(made)
    assert [rows[row][0].tolist() for row in range(3)] == ids
    assert report.images == 3
    for count in (1, 2, 3):  # alone, and beside rows of other lengths, with other numbers of images
        sums = [token_loss(made.model, batch) for batch in pictures.batches_of(rows, made.tokenizer, count).one_pass()]
        assert sum(float(each["loss"]) for each in sums) == pytest.approx(sum(losses), rel=1e-5)
        assert sum(int(each["count"]) for each in sums) == report.eval_trained_tokens


def test_no_token_of_an_image_is_trained(made: Any) -> None:
    rows, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    answers = ["none", "red", "red and blue"]
    for row, answer in enumerate(answers):
        ids, labels = rows[row]
        assert made.tokenizer.decode(ids[labels != -100].tolist()) == f"{answer}<|im_end|>"


@torch.no_grad()
def test_another_image_gives_another_loss(made: Any) -> None:
    rows, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    batch = next(pictures.batches_of(rows, made.tokenizer, 3).one_pass())
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    losses = [float(token_loss(made.model, each)["loss"]) for each in (batch, other)]
    assert losses[0] != losses[1]


def test_lora_adapts_the_language_model_unless_told_otherwise(made: Any) -> None:
    eyes = vision.others(made.model)
    assert eyes
    assert not any(vision.is_below(name, ["lm_head"]) for name in eyes)
    for trains, expected in ((False, {False}), (True, {False, True})):
        model = lora.lora(
            pretrained.load(made.source, none.none(), "cpu"), target_modules="all-linear", train_vision=trains, **LORA
        )
        trained = [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert {vision.is_below(name, eyes) for name in trained} == expected
        assert vision.others(model) == eyes


def test_full_fine_tuning_leaves_the_vision_tower_frozen(made: Any) -> None:
    for trains in (False, True):
        model = lora.none(pretrained.load(made.source, none.none(), "cpu"), train_vision=trains)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert bool(frozen) is not trains
        assert all(vision.is_below(name, vision.others(model)) for name in frozen)


def test_a_family_that_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the type paligemma, which read images, are not supported") as caught:
        vision.check_family(SimpleNamespace(model_type="paligemma", vision_config={}), "/models/mine")
    assert all(name in str(caught.value) for name in IMAGE_FAMILIES)
    for text_model in ("llama", "gemma3"):  # the second reads text here, as it always did
        vision.check_family(SimpleNamespace(model_type=text_model, vision_config={}), "/models/mine")
