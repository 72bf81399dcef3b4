"""A document ends with one end-of-sequence token, or none, whatever the tokenizer adds by itself."""

from __future__ import annotations

import copy

import pytest
from fixtures.chat_tokenizer import build
from tokenizers import processors

from runner.tasks import pretrain

TEXT = "Hello there!"


def tokenizer_with(template: str):
    """A tokenizer whose post-processor writes special tokens around a text ($A)."""
    tokenizer = copy.deepcopy(build(None))
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin_of_text|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


@pytest.mark.parametrize("template", ["$A", "$A <|im_end|>", "<|begin_of_text|> $A <|im_end|>", "<|begin_of_text|> $A"])
@pytest.mark.parametrize("text", [TEXT, f"{TEXT}<|im_end|>"])
def test_one_end_of_sequence(template, text):
    tokenizer = tokenizer_with(template)
    (features,) = pretrain.pretrain(append_eos=True).encode(text, tokenizer, 64)
    start = "<|begin_of_text|>" if template.startswith("<") else ""
    assert tokenizer.decode(features["input_ids"]) in (f"{start}{TEXT}<|im_end|>", f"{start}{text}<|im_end|>")
    assert text != TEXT or features["input_ids"].count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("template", ["$A", "$A <|im_end|>"])
def test_no_end_of_sequence(template):
    tokenizer = tokenizer_with(template)
    (features,) = pretrain.pretrain(append_eos=False).encode(TEXT, tokenizer, 64)
    assert tokenizer.decode(features["input_ids"]) == TEXT
