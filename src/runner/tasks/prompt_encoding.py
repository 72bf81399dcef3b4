"""Encode prompts without answers, for tasks whose answers the model writes."""

from __future__ import annotations

import json
from typing import Any

from runner.data.examples import Example, Features, misfit
from runner.data.packing import IGNORED


def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
    """The prompt, as the model sees it before its answer, and what the reward functions see of the row."""
    from runner.data import chat_template

    if not isinstance(example, dict) or not {"prompt", "columns"} <= example.keys():
        raise misfit(example, "prompts (data/format=prompts)")
    ids = tokenizer(chat_template.prompt(example["prompt"], tokenizer), add_special_tokens=False)["input_ids"]
    record = {"prompt": example["shown"], "columns": example["columns"], "answer": example["answer"]}
    text = json.dumps(record, ensure_ascii=False)
    return [{"input_ids": ids, "labels": [IGNORED] * len(ids), "record": text}]


def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
    """The rendered prompt, and the right answer if the row has one."""
    from runner.data import chat_template

    assert isinstance(example, dict)
    return chat_template.prompt(example["prompt"], tokenizer), str(example["answer"] or "")
