"""``model.chat_template=FILE``: its text is part of the run, and what is no template is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, composed, prepared
from transformers import AutoTokenizer

from runner.errors import ConfigError
from runner.tracking import manifest
from runner.train import worker

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_the_text_of_the_template_is_part_of_the_run(tmp_path: Path, cache: Path):
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    rundir = prepared(tmp_path / "run", *TINY, f"model.chat_template={file}", "train.max_steps=1")
    file.write_text("{{ broken")
    assert manifest.read_config(rundir)["model"]["chat_template"] == TEMPLATE
    assert worker.work(rundir) == 0
    assert AutoTokenizer.from_pretrained(rundir.model).chat_template == TEMPLATE
    file.write_text(TEMPLATE + " ")
    other = composed(*TINY, f"model.chat_template={file}", "train.max_steps=1")
    assert manifest.signature(other) != rundir.read_manifest()["signature"]


@pytest.mark.parametrize(
    ("text", "words", "problem"),
    [
        (None, "", "is no readable text file"),
        ("plain words", "", "is no template: it contains neither"),
        ("{% for m in messages %}{{ m.content }}", "", r"is not valid Jinja: .* \(line 1\)"),
        (TEMPLATE, "task=pretrain", "has no effect: task=pretrain has no conversations"),
    ],
)  # fmt: skip
def test_what_is_no_template_is_refused(text: str | None, words: str, problem: str, tmp_path: Path):
    file = tmp_path / "mine.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        composed(*TINY, f"model.chat_template={file}", *words.split())


def test_the_tags_of_transformers_are_no_errors(tmp_path: Path):
    text = "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
    text += "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    assert composed(*TINY, f"model.chat_template={file}")["model"]["chat_template"] == text
