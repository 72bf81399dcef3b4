"""A tiny model that reads images: Idefics3, the family of SmolVLM, with random weights and a processor of its own.

For tests, and to try settings: no download, a tenth of a second per step. An image of up to 32 × 32 pixels is 4 tokens
and those around them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config.schema import Script, Seed
from runner.errors import Fault
from runner.models import sources, tiny
from runner.models.dtypes import Precision, dtype_faults
from runner.models.kernels import compat
from runner.models.sources import Attention, ModelSource

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
SIDE, PATCH, MERGED = 32, 8, 2
"""Pixels of the side of an image and of a patch; patches of a side that become one token."""
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CACHED = "random-vision-1"
"""The name of the model in the cache; change it when ``write`` changes."""


def random_vision(
    *, seed: Seed, dtype: Precision, attention: Attention, chat_template: Script | None = None
) -> ModelSource:
    """Idefics3 with two decoder layers, two layers of its vision tower, random weights and a byte-level tokenizer."""
    key = f"{CACHED}-{seed}"
    make = functools.partial(sources.make_once, key, functools.partial(write, seed=seed))
    origin = "random weights of model=tiny_vision"
    source = ModelSource(key, None, dtype, attention, False, "random-vision", make, origin)
    return replace(source, chat_template=chat_template)


def check_random_vision(*, dtype: Precision, seed: int, **_: Any) -> Iterator[Fault]:
    yield from dtype_faults("dtype", dtype)
    if not compat.at_least("transformers", "5"):
        yield Fault(
            "seed", "model=tiny_vision needs transformers 5", "install transformers >= 5, or use model=tiny", seed
        )


def write(folder: Path, seed: int) -> None:
    """Write model, tokenizer and processor to ``folder``."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = tiny.byte_tokenizer()
    tiles = [f"<row_{row + 1}_col_{column + 1}>" for row in range(2) for column in range(2)]
    tokenizer.add_special_tokens({"additional_special_tokens": [AROUND, IMAGE, "<end_of_utterance>", WHOLE, *tiles]})
    pixels = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    processor = Idefics3Processor(pixels, tokenizer, image_seq_len=(SIDE // PATCH // MERGED) ** 2, chat_template=CHATML)
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids(tiny.START),
        "eos_token_id": tokenizer.eos_token_id,
    }
    eyes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = Idefics3Config(
        text_config=text,
        vision_config=eyes,
        scale_factor=MERGED,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
    )
    tiny.save_random(Idefics3ForConditionalGeneration, config, folder, seed)
    processor.save_pretrained(folder)
