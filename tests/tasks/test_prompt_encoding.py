"""Prompts without answers, as the model and the reward functions see them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.data import prompts
from runner.data.packing import IGNORED
from runner.errors import DataError
from runner.models import tiny
from runner.tasks import prompt_encoding

RENDERED = "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"


def example(**columns: Any) -> Any:
    row = {"prompt": "Two and two?", **columns}
    return prompts.prompts(row, prompt="prompt", messages="messages", answer="answer")


def test_the_model_sees_the_prompt_up_to_its_answer_and_the_rewards_see_the_row() -> None:
    tokenizer = tiny.byte_tokenizer()
    (features,) = prompt_encoding.encode(example(answer=4, level="easy"), tokenizer, 256)
    assert tokenizer.decode(features["input_ids"]) == RENDERED
    assert features["labels"] == [IGNORED] * len(features["input_ids"])
    assert json.loads(features["record"]) == {
        "prompt": "Two and two?", "columns": {"answer": 4, "level": "easy"}, "answer": 4,
    }  # fmt: skip


def test_the_prompt_is_shown_with_its_right_answer() -> None:
    tokenizer = tiny.byte_tokenizer()
    assert prompt_encoding.prompt(example(answer=4), tokenizer) == (RENDERED, "4")
    assert prompt_encoding.prompt(example(), tokenizer) == (RENDERED, "")


def test_rows_with_answers_are_refused() -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pair = {"prompt": conversation[:1], "chosen": "b", "rejected": "c"}
    for other in (conversation, pair):
        with pytest.raises(DataError, match=r"prompts \(data/format=prompts\)"):
            prompt_encoding.encode(other, tiny.byte_tokenizer(), 256)
