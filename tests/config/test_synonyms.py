"""Words of other programs: each is answered with something that exists here."""

from __future__ import annotations

import re

import pytest

from runner.cli import main
from runner.config import bind, synonyms
from runner.config.bind import config_dir, flatten

OPTIONS = {
    f"{path.parent.relative_to(config_dir())}={path.stem}": path
    for path in config_dir().rglob("*.yaml")
    if path.parent != config_dir()
}
KEYS = {
    f"{choice.partition('=')[0].replace('/', '.')}.{key}"
    for choice in OPTIONS
    for key, _ in flatten(bind.option(*choice.split("=")))
} | {"name", "seed", "outputs_dir", "resume", "sweep", "code"}


def test_each_key_that_is_named_exists():
    assert set(synonyms.KEYS.values()) <= KEYS
    assert len(synonyms.KEYS) + len(synonyms.SENTENCES) + len(synonyms.OPTIONS) > 100


def test_each_option_and_key_in_a_sentence_exists():
    for text in [*synonyms.SENTENCES.values(), *synonyms.OPTIONS.values()]:
        for group, option in re.findall(r"(?<![\w.+])([a-z/]+)=([a-z_0-9]+)\b", text):
            assert f"{group}={option}" in OPTIONS or (group, option) == ("resume", "auto"), text
        for key in re.findall(r"(?<![\w+.])([a-z]+(?:\.[a-z_]+)+)=", text):
            assert key in KEYS | {"launcher.additional_parameters"}, text


def test_no_word_of_ours_is_in_the_table():
    """It would be answered with itself where another option lacks it."""
    names = {key.rpartition(".")[2] for key in KEYS}
    assert {word for word in synonyms.KEYS if word in names and synonyms.KEYS[word].endswith(f".{word}")} == set()
    assert set(synonyms.OPTIONS) & set(OPTIONS) == set()


def test_each_verb_and_option_in_an_answer_exists():
    assert not set(synonyms.WORDS) & set(main.VERBS)
    for answer in synonyms.ANSWERS:
        if verb := re.match(r"write ([a-z]+)\b(?!=)", answer):
            assert verb[1] in main.VERBS, answer
        for group, option in re.findall(r"\b(task|launcher|search)=([a-z]+)", answer):
            assert f"{group}={option}" in OPTIONS, answer


@pytest.mark.parametrize(
    ("word", "here"),
    [("lr", "optim.learning_rate"), ("bf16", "model.dtype"), ("rank", "lora.r"),
     ("lr_scheduler_type", "schedule=cosine"),
     ("resume_from_checkpoint", "resume=auto"), ("name_or_path", "model.path"), ("description", "tracking.notes"),
     ("comment", "+launcher.additional_parameters.comment"), ("mail-type", "+launcher.additional_parameters.mail_type"),
     ("load_best_model_at_end", "train.metric_for_best_model"),
     ("cutoff_len", "data.max_length"), ("max_epochs", "train.num_train_epochs"),
     ("tensor_parallel_size", "parallel=fsdp"), ("context-parallel-size", "train.memory=offload"),
     ("activation_offloading", "train.memory=offload"), ("deepspeed_config", "parallel=fsdp"),
     ("nobody_says_this", "")],
)  # fmt: skip
def test_a_word_is_answered(word: str, here: str):
    assert here in synonyms.hint(word)
    assert bool(synonyms.hint(word)) == bool(here)


@pytest.mark.parametrize(
    ("group", "option", "here"),
    [("task", "ppo", "options here: sft; a loss"), ("optim", "sgd", "optim.name=SGD"), ("quant", "NF4", "quant=4bit"),
     ("optim", "zzz", "")],
)  # fmt: skip
def test_an_option_is_answered(group: str, option: str, here: str):
    assert here in synonyms.option_hint(group, option, ["sft"])
