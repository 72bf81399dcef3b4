"""Images of a row: where its messages have them, and how they are read.

In the content of a message, the character ``MARK`` stands for each image; ``message["images"]`` lists where the images
are: ``{"path": …}`` or ``{"bytes": …}`` (base64), None for a part without an image of its own. A file stays where it
is, and bytes stay as compressed as they are: an image of 100 KiB has 50 MiB of pixels once a processor has cut it into
tiles.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.data.texts import Texts
from runner.data.training_keys import Row, has_value
from runner.errors import DataError, Fault, quoted

Reference = dict[str, Any]
"""Where an image is. One that was read (``settled``) has its absolute path, its size and time of change, and a hash."""

MARK = "\ue002"
"""Stands for an image in the content of a message; a private-use character, absent from real text."""
KEYS = ("images", "image")
"""Keys of a row with its images."""
PARTS = ("image", "image_url")
"""Types of the parts of a content that are images."""
TAG = "<image>"
"""Stands for an image of the row in a text, as in LLaMA-Factory and ms-swift."""
LEAVE_OUT = "leave the row out, or train without its images knowingly: +data.format.ignore=[images]"


def of_part(part: Mapping[str, Any], what: str) -> Reference | None:
    """The image of a part ``{"type": "image", "image" | "path" | "url" | "base64": …}``; None if the row has it.

    OpenAI's ``{"type": "image_url", "image_url": {"url": …}}`` is the same.

    Raises:
        DataError: it is not an image, or has to be fetched from the Internet.
    """
    given = [key for key in ("image", "path", "url", "image_url", "base64", "bytes") if part.get(key) is not None]
    if len(given) > 1:
        raise DataError(Fault("", f"{what} has several images: {', '.join(given)}", "write one part for each image"))
    return of_value(part[given[0]], what, is_base64=given[0] == "base64") if given else None


def of_value(value: object, what: str, *, is_base64: bool = False) -> Reference:
    """The reference of a path, a ``file:`` or ``data:`` URL, or an object with one of them; raises as ``of_part``."""
    if isinstance(value, Mapping):
        inner = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if inner is not None:
            return of_value(inner, what)
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if not isinstance(value, str) or not value.strip():
        problem = f"{what} is {quoted(value)}; a path, a data: URL or an object with bytes or a path is needed"
        raise DataError(Fault("", problem, "correct the row"))
    if is_base64 or value.startswith("data:"):
        return {"bytes": _base64(value.rpartition(",")[2], what)}
    if re.match(r"(https?|ftp|s3|gs|hf)://", value):
        problem = f"{what} is on the Internet ({quoted(value)}): what is there may change while a run reads it"
        raise DataError(Fault("", problem, "download the images, and write their paths into the rows"))
    return {"path": value.removeprefix("file://")}


def of_row(row: Row, ignore: Collection[str]) -> list[Reference]:
    """The images beside the conversation of a row, under ``KEYS``; raises as ``of_part``.

    ``ignore``: with one of ``KEYS``, all images are left out.
    """
    found: list[Reference] = []
    for key in KEYS if not is_ignored(ignore) else ():
        value = row.get(key)
        if not has_value(key, value):
            continue
        listed = value if isinstance(value, list) else [value]
        found += [of_value(each, f"the image under '{key}'") for each in listed]
    return found


def is_ignored(ignore: Collection[str]) -> bool:
    """Whether the user leaves out images knowingly (``data.format.ignore``)."""
    return any(key in ignore for key in KEYS)


def give(messages: Sequence[dict[str, Any]], images: Sequence[Reference]) -> None:
    """Put the images of a row where the messages have parts without an image, or ``TAG``; changes the messages.

    Messages without any of these have them at the beginning of the first question, as in TRL.

    Raises:
        DataError: there are more or fewer places than images, or an answer has an image.
    """
    places = sum(_places(message) for message in messages) if images else 0
    if images and not places:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"] = MARK * len(images) + first["content"]
        first["images"] = [*images, *first.get("images", ())]
    elif images and places != len(images):
        problem = f"the row has {len(images)} images, and its messages have {places} places for them"
        raise DataError(Fault("", problem, f"write one part of type image, or one {TAG}, for each image"))
    elif images:
        upcoming = iter(images)
        for message in messages:
            _fill(message, upcoming)
    for number, message in enumerate(messages, start=1):
        if message.get("images") and message["role"] == "assistant":
            problem = f"message {number} is an answer with an image: the model writes text alone"
            raise DataError(Fault("", problem, "leave the row out, or move the image into a question"))


def of_messages(messages: Sequence[Mapping[str, Any]]) -> list[Reference | None]:
    """The images of a conversation, in their order."""
    return [image for message in messages for image in message.get("images", ())]


def of_rows(texts: Texts | None, row: int) -> list[Reference]:
    """The images of a tokenised row; ``texts``: those of all rows, ``Rows.images``."""
    return [] if texts is None else list(json.loads(texts[row]))


def settled(reference: Reference | None, folder: Path) -> Reference:
    """The reference with what identifies the image; a relative path begins at ``folder``.

    Raises:
        DataError: there is no such file, or no image.
    """
    if reference is None:
        problem = "a part of type image has no image, and the row has no images beside its messages"
        raise DataError(Fault("", problem, 'write {"type": "image", "path": FILE}'))
    if "path" not in reference:
        return {**reference, "sha256": hashlib.sha256(content(reference)).hexdigest()}
    path = folder / Path(reference["path"]).expanduser()
    with _readable(path):
        state = os.stat(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": str(path.absolute()), "sha256": digest, "size": state.st_size, "time": state.st_mtime_ns}


def is_unchanged(reference: Reference) -> bool:
    """Whether a settled image is still there, with the same bytes; reads them only if its size or time is another."""
    if "path" not in reference:
        return True
    try:
        state = os.stat(reference["path"])
        if (state.st_size, state.st_mtime_ns) == (reference["size"], reference["time"]):
            return True
        return hashlib.sha256(Path(reference["path"]).read_bytes()).hexdigest() == reference["sha256"]
    except OSError:
        return False


def content(reference: Reference) -> bytes:
    """The bytes of an image file.

    Raises:
        DataError: it cannot be read, or has changed since it was settled.
    """
    if "path" not in reference:
        return base64.b64decode(reference["bytes"])
    with _readable(Path(reference["path"])):
        data = Path(reference["path"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != reference.get("sha256"):
        problem = f"the image {reference['path']} has changed since the rows were tokenised"
        raise DataError(Fault("data", problem, "restore it, or start a new run"))
    return data


def opened(reference: Reference) -> Any:
    """The image as PIL has it, decoded, in RGB; (width, height) is its ``size``. Transparent parts are white.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = reference.get("path", "an image inside the row")
    try:
        with Image.open(io.BytesIO(content(reference))) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        problem = f"{name} is no image that can be read: {reason}"
        raise DataError(Fault("", problem, "replace the file, or leave the row out")) from error


def _places(message: Mapping[str, Any]) -> int:
    """How many images of the row a message has a place for."""
    tags = message["content"].count(TAG) if message["role"] != "assistant" else 0
    return tags + sum(image is None for image in message.get("images", ()))


def _fill(message: dict[str, Any], upcoming: Iterator[Reference]) -> None:
    """Give a message the next images of the row, as many as it has places for."""
    if not _places(message):
        return
    own, found = iter(message.get("images", ())), list[Reference]()
    for place in re.findall(f"{MARK}|{re.escape(TAG)}", message["content"]):
        image = next(own) if place == MARK else None
        found.append(next(upcoming) if image is None else image)
    message["content"] = message["content"].replace(TAG, MARK)
    message["images"] = found


def _base64(text: str, what: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(Fault("", f"{what} is not valid base64", "encode the bytes of the file again")) from None
    return text


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """For a block that reads a file: its errors as a message."""
    try:
        yield
    except OSError as error:
        problem = f"the image {path} cannot be read: {error.strerror or error}"
        remedy = "correct the path (relative ones begin at the folder of the data file), or leave the row out"
        raise DataError(Fault("", problem, remedy)) from None
