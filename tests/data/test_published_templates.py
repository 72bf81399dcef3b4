"""The answers of some 25 published chat templates, against the ``{% generation %}`` marks that TRL put into them.

Needs TRL's files: ``uv run --with trl pytest -m slow tests/data/test_published_templates.py``; skipped without them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runner.data import chat_template
from runner.data.packing import IGNORED
from runner.errors import DataError

pytestmark = pytest.mark.slow
SPECIAL = r"<\|[^|>\s]{1,30}\|>|<｜[^｜]{1,30}｜>|</?[a-z_]{3,20}>|\[[A-Z/_]{3,20}\]|<[a-z_]+\|>|<\|[a-z_]+>"
WITHOUT_TEXT = {"idefics3", "llava_next", "smolvlm"}
"""They write contents that are lists of parts, for images."""
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2}}}
QUESTION, RESULT = {"role": "user", "content": "Rome?"}, {"role": "tool", "name": "weather", "content": "sunny"}
ANSWER = {"role": "assistant", "content": "It is sunny."}
TALKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([QUESTION, ANSWER, QUESTION, ANSWER], {}),
    "tools": ([QUESTION, {**ANSWER, "content": "", "tool_calls": [CALL]}, RESULT, ANSWER], {"tools": TOOLS}),
    "reasoning": ([QUESTION, {**ANSWER, "reasoning_content": "Look."}, QUESTION,
                   {**ANSWER, "reasoning_content": "Oh."}], {}),
    "both": ([QUESTION, {**ANSWER, "content": "", "reasoning_content": "Look.", "tool_calls": [CALL]}, RESULT,
              {**ANSWER, "reasoning_content": "Oh."}], {"tools": TOOLS}),
}  # fmt: skip


def templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")  # does not import it
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("nowhere")
    return sorted(
        file for file in folder.glob("*_training.jinja") if file.stem[: -len("_training")] not in WITHOUT_TEXT
    )


def tokenizer_of(text: str) -> Any:
    """A byte-level tokenizer with the special tokens of a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [*sorted(set(re.findall(SPECIAL, text))), "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["It is the weather"], trainer)
    built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    built.chat_template = text
    return built


def without_marks(text: str) -> str:
    def condition(mark: re.Match[str]) -> str:
        return f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}"

    return re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", condition, text)


def answers(tokenizer: Any, name: str) -> list[str] | None:
    """The trained texts; None if the template cannot write this conversation."""
    messages, options = TALKS[name]
    try:
        features = chat_template.encode(messages, tokenizer, "assistant", options=options)
    except DataError:
        return None
    plain = chat_template.of(tokenizer).renderer.plain(messages)
    reference = tokenizer.apply_chat_template(plain, return_dict=True, **options)
    assert features["input_ids"] == reference["input_ids"]
    texts, run = [], []
    for token, label in zip(features["input_ids"], [*features["labels"][:], IGNORED], strict=False):
        if label != IGNORED:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return [*texts, tokenizer.decode(run)] if run else texts


@pytest.mark.extras
@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("file", templates(), ids=lambda file: file.stem[: -len("_training")])
def test_answers_are_those_between_the_marks(file: Path, name: str) -> None:
    """Except what the prompt gives already ("<think>"), the line break after a turn, and the end of the whole text."""
    text = file.read_text()
    marked = answers(tokenizer_of(text), name)
    tokenizer = tokenizer_of(without_marks(text))
    found = answers(tokenizer, name)
    assert (found is None) == (marked is None)
    prompt = chat_template.prompt(TALKS["plain"][0][:1], tokenizer)
    for own, theirs in zip(found or [], marked or [], strict=True):
        own = own.removesuffix("<|tool_response>")  # Gemma stops there: the result of the tool follows in the same turn
        assert own in theirs
        before, _, after = theirs.partition(own)
        assert before in prompt
        assert after.strip() in ("", "<eos>", "<|end|>")  # of gpt-oss: an earlier answer ends otherwise than the last


@pytest.mark.extras
def test_there_are_templates() -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    assert len(templates()) >= 25
