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

from runner.data.vision import largest
from runner.errors import ConfigError
from runner.models import lora, pretrained, vision
from runner.models.kernels import activation_checkpointing, attention, base_model, buffers, lm_head
from runner.models.kernels.base_model import IMAGE_FAMILIES
from runner.models.quantization import none
from runner.tasks import cross_entropy
from runner.tasks.task import token_loss
from runner.train.memory import peak

pytestmark = pictures.needs_transformers_5

CPU = torch.device("cpu")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "bias": "none", "use_dora": False,
        "use_rslora": False, "init_lora_weights": "gaussian"}  # fmt: skip


@pytest.fixture(scope="module", params=pictures.FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    """A tiny model of a family with its processor, and rows with no image, one, two, and some in turns of each role."""
    folder = tmp_path_factory.mktemp(request.param)
    source, tokenizer = pictures.loaded(pictures.write(folder / "model", request.param))
    pictures.square(folder / "wide.png", "blue", 90, 40)
    two = pictures.asked({"path": "small.png"}, "red and blue", "Which is this?")
    two["messages"][0]["content"].append({"type": "image", "path": str(folder / "wide.png")})
    pictures.square(folder / "small.png", "red", 20, 30)
    small, wide = ({"type": "image", "path": f"{name}.png"} for name in ("small", "wide"))
    turns = [("system", [small, text("Look.")]), ("user", [wide, text("Which are these?"), small, wide]),
             ("assistant", "blue, red, blue"), ("tool", [text("It found"), small]), ("assistant", "another"),
             ("user", [wide, small, text("And now?")]), ("assistant", "both")]  # fmt: skip
    many = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = [pictures.asked(None, "none"), pictures.asked({"path": "small.png"}, "red"), two, many]
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
        found = [part["path"] for turn in talk for part in turn["content"] if part["type"] == "image"]
        images = [Image.open(made.folder / path).convert("RGB") for path in found]
        inputs = processor(
            text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
        )
        labels = torch.full_like(inputs["input_ids"], -100)
        for turn in row["messages"]:
            if turn["role"] == "assistant":
                answer = processor.tokenizer(turn["content"] + "<|im_end|>", return_tensors="pt")["input_ids"][0]
                (at,) = (inputs["input_ids"][0].unfold(0, len(answer), 1) == answer).all(1).nonzero()[:, 0]
                labels[0, at : at + len(answer)] = answer
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
        ids.append(inputs["input_ids"][0].tolist())
        losses.append(float(loss) * int((labels != -100).sum()))
    return ids, losses


def _parts(content: Any) -> Any:
    return [text(content)] if isinstance(content, str) else content


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@torch.no_grad()
def test_rows_and_losses_are_those_of_transformers(made: Any) -> None:
    rows, report = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    ids, losses = plain_losses(made)
    assert [rows[row][0].tolist() for row in range(4)] == ids
    assert report.images == 10
    for count in (1, 4):  # alone, and beside rows of other lengths, with other numbers of images
        sums = [token_loss(made.model, batch) for batch in pictures.batches_of(rows, made.tokenizer, count).one_pass()]
        assert sum(float(each["loss"]) for each in sums) == pytest.approx(sum(losses), rel=1e-5)
        assert sum(int(each["count"]) for each in sums) == report.eval_trained_tokens


@torch.no_grad()
def test_packed_rows_have_the_losses_that_they_have_alone(made: Any) -> None:
    alone, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    packed, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer, packing=True)
    assert len(packed.packs) < len(alone.packs), "several rows share a pack"
    (batch,) = pictures.batches_of(packed, made.tokenizer, 3, packing=True).one_pass()
    assert batch["packed"]
    loss = token_loss(made.model, batch)["loss"]
    each = [token_loss(made.model, row) for row in pictures.batches_of(alone, made.tokenizer, 1).one_pass()]
    assert float(loss) == pytest.approx(sum(float(row["loss"]) for row in each), rel=1e-5)
    attention.check_isolation(made.model, None, 64)  # of documents without images, too


def test_no_token_of_an_image_is_trained(made: Any) -> None:
    rows, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    answers = ["none"], ["red"], ["red and blue"], ["blue, red, blue", "another", "both"]
    for row, texts in enumerate(answers):
        ids, labels = rows[row]
        assert made.tokenizer.decode(ids[labels != -100].tolist()) == "".join(f"{answer}<|im_end|>" for answer in texts)


@torch.no_grad()
def test_another_image_gives_another_loss(made: Any) -> None:
    rows, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer)
    batch = next(pictures.batches_of(rows, made.tokenizer, 4).one_pass())
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


@pytest.mark.parametrize(
    ("trains", "packing"), [pytest.param(False, False, marks=pytest.mark.slow), (True, True)], ids=["rows", "packs"]
)
def test_a_simulated_step_needs_the_memory_of_a_real_one(made: Any, trains: bool, packing: bool) -> None:
    rows, _ = pictures.tokenised(made.folder / "rows.jsonl", made.tokenizer, packing=packing)
    batches = pictures.batches_of(rows, made.tokenizer, 2, packing=packing)
    given, shape = largest(batches), batches.largest

    def adapted(model: torch.nn.Module) -> torch.nn.Module:
        return lora.lora(model, target_modules="all-linear", train_vision=trains, **LORA)

    expected = peak.rehearsed(
        lambda layers: adapted(pretrained.empty(made.source, none.none(), CPU, layers)), 2, shape,
        by_document=False, kept="speed", autocast=None, device=CPU, images=given,
    )  # fmt: skip
    model = adapted(pretrained.load(made.source, none.none(), "cpu")).train()
    lm_head.adopt(model)
    activation_checkpointing.arrange(model, "speed")
    with peak.Ledger() as ledger:
        for tensor in (*model.parameters(), *(each for each in given.values() if isinstance(each, torch.Tensor))):
            ledger.enter(tensor)
        inputs = attention.inputs(given, packing, model)
        inputs = {name: inputs[name] for name in cross_entropy.MODEL_INPUTS if name in inputs}
        cross_entropy.rehearsal(model, inputs, torch.zeros(-(-shape.trained // 2), dtype=torch.int64)).backward()
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    real = ledger.peak - sum(parameter.nbytes for parameter in model.parameters()) - trained
    print(f"simulated {expected}, measured {real}")
    reused = sum(storage.nbytes() for storage in buffers._BUFFERS.named.values())  # in no estimate
    assert -0.02 * expected < real - expected < 0.02 * expected + reused
    without = {name: value for name, value in given.items() if name not in base_model.IMAGE_ARGUMENTS}
    without["input_ids"] = given["input_ids"] * 0
    text = peak.rehearsed(
        lambda layers: adapted(pretrained.empty(made.source, none.none(), CPU, layers)), 2, shape,
        by_document=False, kept="speed", autocast=None, device=CPU, images=without,
    )  # fmt: skip
    assert expected > text + 0.9 * given["pixel_values"].nbytes


def test_a_family_that_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the type paligemma, which read images, are not supported") as caught:
        vision.check_family(SimpleNamespace(model_type="paligemma", vision_config={}), "/models/mine")
    assert all(name in str(caught.value) for name in IMAGE_FAMILIES)
    for text_model in ("llama", "gemma3"):  # the second reads text here, as it always did
        vision.check_family(SimpleNamespace(model_type=text_model, vision_config={}), "/models/mine")
