"""Images for a model that reads them, through its own processor: their tokens in a row, and their tensors in a batch.

A processor writes several tokens for the one that a chat template writes for an image; how many depends on the size of
the image alone in all supported families. A row keeps these tokens and where its images are; pixels are computed when a
batch is made, in the thread that prepares the next step: those of a data set would need a thousand times the memory of
its files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runner.data import images
from runner.data.examples import Example, Features, chat
from runner.data.images import Reference
from runner.data.packing import IGNORED
from runner.errors import ConfigError, DataError, Fault, RunnerError, first_line

if TYPE_CHECKING:
    from runner.data.batches import Batches

TENSORS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "mm_token_type_ids")
"""What a batch has of its images, by the names of the model's arguments; their shapes are those of the processor."""
NESTED = ("Idefics3", "SmolVLM")
"""Beginnings of the names of image processors whose tensors have a dimension of rows: (B, images, …). The others have
the images of all rows one behind the other."""


def of(tokenizer: Any) -> Vision | None:
    """What reads the images of a model; None for the tokenizer of a model that reads text alone."""
    processor = getattr(tokenizer, "processor", None)
    return None if processor is None else _vision(processor)


@functools.lru_cache(maxsize=16)
def _vision(processor: Any) -> Vision:
    return Vision(processor)


def fingerprint(tokenizer: Any) -> str:
    """What decides, beside the tokenizer, how images become tokens and pixels; empty without a processor."""
    processor = getattr(tokenizer, "processor", None)
    if processor is None:
        return ""
    own = {key: value for key, value in vars(processor).items() if isinstance(value, int | str | bool | None)}
    return json.dumps([type(processor).__name__, own, str(processor.image_processor.to_dict())], sort_keys=True)


def largest(batches: Batches) -> dict[str, Any]:
    """What a model is given of as many packs as a batch has, those with the most tokens of images.

    ``input_ids`` (B, T) and ``TENSORS``, with ``position_ids`` and ``spans``, see ``collator``. T is that of
    ``Batches.largest``: no batch has more tokens, and none more images.
    """
    from torch.nn import functional as F

    rows, vision = batches.rows, batches.vision
    assert vision is not None
    counts = np.add.reduceat(rows.ids == vision.token_id, rows.offsets[:-1], dtype=np.int64)
    most = np.argsort(batches.packs.numbers(counts.__getitem__), kind="stable")[-batches.rows_per_batch :]
    batch = batches.of(most.tolist())
    more = (0, max(batches.largest.length - batch["input_ids"].shape[1], 0))
    found = {name: batch[name] for name in (*TENSORS, "position_ids", "spans", "packed") if name in batch}
    padded: dict[str, Any] = {
        name: F.pad(found[name], more) for name in ("position_ids", "mm_token_type_ids") if name in found
    }
    return {"input_ids": F.pad(batch["input_ids"], more, value=batches.pad_id), **found, **padded}


class Vision:
    """The processor of a model, for the images of its rows."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.image_processor = processor, processor.image_processor
        self.token, self.token_id = str(processor.image_token), int(processor.image_token_id)
        self.is_nested = type(self.image_processor).__name__.startswith(NESTED)
        self._tokens: dict[tuple[int, int], list[int]] = {}

    def settled(self, example: Example, folder: str) -> Example:
        """The example with images that are found: relative paths begin at ``folder``, see ``images.settled``.

        Raises:
            DataError: an image is missing.
        """
        talk = chat(example)
        if talk is None or not images.of_messages(talk.messages):
            return example
        messages = [
            {**turn, "images": [images.settled(image, Path(folder)) for image in turn["images"]]}
            if turn.get("images")
            else turn
            for turn in talk.messages
        ]
        return {**example, "messages": messages} if isinstance(example, dict) else messages

    def expanded(self, features: Features, references: Sequence[Reference]) -> Features:
        """The sequence with all tokens of its images, none of which is trained, and its ``images``.

        Raises:
            DataError: an image cannot be read, or a text has the token of an image.
            ConfigError: the processor writes images in a way that is not known here.
        """
        ids, found = features["input_ids"], features["input_ids"].count(self.token_id)
        if found != len(references):
            problem = f"the text of the row has {found} times the token {self.token}, and {len(references)} images"
            raise DataError(Fault("", problem, "take the token out of the texts, or leave the row out"))
        of_images = iter([self.tokens_of(reference) for reference in references])
        kept: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "weights") if name in features}
        for at, token in enumerate(ids):
            if token != self.token_id:
                for name, values in kept.items():
                    values.append(features[name][at])
                continue
            tokens = next(of_images)
            kept["input_ids"] += tokens
            kept["labels"] += [IGNORED] * len(tokens)
            if "weights" in kept:
                kept["weights"] += [0.0] * len(tokens)
        tokens_of_images = len(kept["input_ids"]) - len(ids) + found
        return {**features, **kept, "images": list(references), "image_tokens": tokens_of_images}

    def tokens_of(self, reference: Reference) -> list[int]:
        """The tokens that stand for an image. Raises as ``expanded``."""
        image = images.opened(reference)
        if image.size not in self._tokens:
            try:
                tokens = self._ids(self.token, [image])
                if not self._tokens:
                    self._check(image, tokens)
            except RunnerError:
                raise
            except Exception as error:  # a processor is the library's code, or the model's own: it may raise anything
                name = f"{reference.get('path', 'an image inside the row')} ({image.width} × {image.height})"
                problem = f"the model's processor cannot read {name}: {first_line(error)}"
                raise DataError(Fault("", problem, "replace the image, or leave the row out")) from error
            self._tokens[image.size] = tokens
        return self._tokens[image.size]

    def tensors(self, rows: Sequence[Sequence[Reference]], ids: Any) -> dict[str, Any]:
        """The tensors of the images of a batch (``TENSORS``), float32 and int64; none without images.

        ``rows``: the images of each row of the batch, in the order of their tokens. ``ids``: its tokens, (B, T).

        Raises:
            DataError: an image has changed since the rows were tokenised.
        """
        if not any(rows):
            return {}
        opened = [[images.opened(reference) for reference in row] for row in rows]
        given = opened if self.is_nested else [image for row in opened for image in row]
        made: Mapping[str, Any] = self.image_processor(images=given, return_tensors="pt")
        tensors = {name: made[name] for name in TENSORS if name in made}
        if "image_grid_thw" in tensors:  # the positions of Qwen's models depend on which tokens are images
            tensors["mm_token_type_ids"] = (ids == self.token_id).int()
        return tensors

    def _ids(self, text: str, pictures: list[Any]) -> list[int]:
        encoded = self.processor(text=[text], images=[pictures], add_special_tokens=False)
        return [int(token) for token in encoded["input_ids"][0]]

    def _check(self, image: Any, tokens: list[int]) -> None:
        """Check that an image has the same tokens whatever is around it."""
        before, between, after = (self._text_ids(text) for text in ("One: ", "\ntwo ", "?"))
        whole = self._ids(f"One: {self.token}\ntwo {self.token}?", [image, image])
        if whole != [*before, *tokens, *between, *tokens, *after] or self.token_id not in tokens:
            problem = "its processor writes the tokens of an image in a way that is not known here"
            raise ConfigError(Fault("model.path", problem, "use a model of another family"))

    def _text_ids(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
