"""Images of a row: found in each place where other programs have them, read, or refused."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
from fixtures import pictures
from fixtures.data_formats import ANSWER, QUESTION, read, refused
from PIL import Image

from runner.data import images
from runner.data.images import MARK
from runner.errors import DataError

A, B = {"path": "a.png"}, {"path": "b.png"}


def question(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def part(**image: Any) -> dict[str, Any]:
    return {"type": "image", **image}


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [question([part(path="a.png"), TEXT, part(image="b.png")]), ANSWER]},
        {
            "messages": [
                question([part(url="file://a.png"), TEXT, part(image={"path": "b.png", "bytes": None})]),
                ANSWER,
            ]
        },
        {"messages": [question([part(), TEXT, part()]), ANSWER], "images": ["a.png", "b.png"]},
        {"messages": [question([part(), TEXT, part(path="b.png")]), ANSWER], "image": "a.png"},
        {"messages": [question("<image>What?<image>"), ANSWER], "images": [{"path": "a.png"}, "b.png"]},
        {
            "messages": [
                question([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT, part(path="b.png")]),
                ANSWER,
            ]
        },
    ],
    ids=["parts", "urls", "bare", "one", "tags", "openai"],
)
def test_images_are_found_where_other_programs_have_them(row: dict[str, Any]) -> None:
    assert read(row) == [{"role": "user", "content": f"{MARK}What?{MARK}", "images": [A, B]}, ANSWER]


def test_images_without_a_place_begin_the_first_question() -> None:
    system = {"role": "system", "content": "Look."}
    row = {"messages": [system, question("What?"), ANSWER], "images": ["a.png", "b.png"]}
    assert read(row) == [system, {"role": "user", "content": f"{MARK}{MARK}What?", "images": [A, B]}, ANSWER]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Four."}]},
        ),
        ("alpaca", {"instruction": "What?", "input": "", "output": "Four."}),
        ("prompt_completion", {"prompt": "<image>What?", "completion": "Four."}),
    ],
)
def test_each_format_of_conversations_has_images(name: str, row: dict[str, Any]) -> None:
    asked = {"role": "user", "content": f"{MARK}What?", "images": [A]}
    assert read({**row, "images": ["a.png"]}, name) == [asked, ANSWER]
    text = read({**row, "images": ["a.png"]}, name, "+format.ignore=[images]")
    assert not any("images" in turn for turn in text)  # left out knowingly


def test_images_are_left_out_knowingly() -> None:
    parts = {"messages": [question([part(path="a.png"), TEXT]), ANSWER], "image": "b.png"}
    for ignored in ("images", "image"):
        assert read(parts, "messages", f"+format.ignore=[{ignored}]") == [question("What?"), ANSWER]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [question([part()]), ANSWER], "images": ["a.png", "b.png"]}, "2 images, and its messages have 1"),
        ({"messages": [question("<image> or <image>?"), ANSWER], "images": ["a.png"]}, "its messages have 2 places"),
        ({"messages": [QUESTION, {**ANSWER, "content": [part(path="a.png")]}]}, "message 2 is an answer with an image"),
        ({"messages": [question([part(path="https://a.b/c.png")]), ANSWER]}, "is on the Internet"),
        ({"messages": [question([part(image=5)]), ANSWER]}, "is 5; a path, a data: URL"),
        ({"messages": [question([part(path="a.png", url="b.png")]), ANSWER]}, "has several images: path, url"),
        ({"messages": [question([part(image="data:image/png;base64,?")]), ANSWER]}, "is not valid base64"),
        ({"messages": [question([{"type": "video"}]), ANSWER]}, "neither text nor images"),
        ({"messages": [QUESTION, ANSWER], "images": [None]}, "the image under 'images' is None"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(row: dict[str, Any], problem: str) -> None:
    assert problem in refused(row)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_bytes_are_an_image_too() -> None:
    content = encoded(Image.new("RGB", (3, 2), "red"))
    text = base64.b64encode(content).decode()
    for value in (content, {"bytes": content, "path": None}, f"data:image/png;base64,{text}"):
        reference = images.settled(images.of_value(value, "it"), Path())
        assert images.opened(reference).size == (3, 2)
    assert images.settled(images.of_part({"base64": text}, "it"), Path())["bytes"] == text


def test_a_relative_path_begins_at_the_folder(tmp_path: Path) -> None:
    file = pictures.square(tmp_path / "a.png", "red", 5, 4)
    reference = images.settled({"path": "a.png"}, tmp_path)
    assert reference["path"] == str(file)
    assert images.settled({"path": str(file)}, Path("/nowhere"))["sha256"] == reference["sha256"]
    assert images.opened(reference).size == (5, 4)
    assert images.opened(reference).getpixel((0, 0)) == pictures.COLOURS["red"]


def test_an_image_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the image .*a\.png cannot be read: No such file"):
        images.settled({"path": "a.png"}, tmp_path)
    with pytest.raises(DataError, match="has no image"):
        images.settled(None, tmp_path)
    content = encoded(Image.new("RGB", (64, 64), "red"))
    for name, broken in (("text.png", b"no image"), ("cut.png", content[: len(content) // 2]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=f"{name} is no image that can be read"):
            images.opened(images.settled({"path": name}, tmp_path))


def test_a_change_of_an_image_is_seen(tmp_path: Path) -> None:
    file = pictures.square(tmp_path / "a.png", "red")
    reference = images.settled({"path": "a.png"}, tmp_path)
    assert images.is_unchanged(reference)
    os.utime(file, ns=(1, 1))  # copied: another time, the same bytes
    assert images.is_unchanged(reference)
    pictures.square(file, "blue")
    assert not images.is_unchanged(reference)
    with pytest.raises(DataError, match=r"a\.png has changed since the rows were tokenised"):
        images.opened(reference)
    file.unlink()
    assert not images.is_unchanged(reference)


def test_transparency_is_white_and_pictures_are_upright(tmp_path: Path) -> None:
    clear = images.settled(images.of_value(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))), "it"), tmp_path)
    assert images.opened(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert images.opened(images.settled({"path": "turned.jpg"}, tmp_path)).size == (2, 4)
