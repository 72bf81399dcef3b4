"""generate against plain PEFT."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
from fixtures.trained_runs import _there, asked_plainly, said, trained
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.errors import visible
from runner.train.run_summary import NOTHING

# generate


def test_generate_gives_the_text_of_plain_peft(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    model = AutoPeftModelForCausalLM.from_pretrained(run.model)
    expected = asked_plainly(model, AutoTokenizer.from_pretrained(run.model), "Hello!", 24)
    code, out, _ = said(capsys, "generate", "first", "Hello!", "--max-new-tokens", "24")
    assert (code, out.strip()) == (0, expected)
    assert expected


def test_generate_reads_stdin_and_draws_the_same_with_the_same_seed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    drawn = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!"))
        code, out, _ = said(
            capsys, "generate", "first", "-", "--temperature", "1", "--seed", seed, "--max-new-tokens", "24"
        )
        assert code == 0
        drawn.append(out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_empty_pipe_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr("runner.train.trained_model.load", None)
    code, out, err = said(capsys, "generate", "first")
    assert (code, out) == (2, "")
    assert "stdin is empty" in err


@pytest.mark.parametrize("name", ["first", "whole", "four"])
def test_compare_asks_the_base_as_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str):
    from runner.cli import generate
    from runner.train.trained_model import load_base

    run = trained(name)
    loads = []
    monkeypatch.setattr("runner.train.trained_model.load_base", lambda *a, **k: loads.append(a) or load_base(*a, **k))
    tables: list[Any] = []
    monkeypatch.setattr(generate.terminal, "table", lambda *table: tables.append(table))
    words = ("generate", name, "Hello!", "--max-new-tokens", "24", *(("--temperature", "1") if name == "whole" else ()))
    assert said(capsys, *words, "--compare")[0] == 0
    ((_, columns, [(base, tuned)]),) = tables
    assert columns == ["base", "fine-tuned"]
    assert len(loads) == 1  # the base under the adapter is the base of the comparison
    _, alone, _ = said(capsys, *words)
    assert alone.strip() == visible(tuned) != base
    if name == "first":
        origin = json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"]
        plain, tokenizer = AutoModelForCausalLM.from_pretrained(origin), AutoTokenizer.from_pretrained(origin)
        assert base == (asked_plainly(plain, tokenizer, "Hello!", 24) or NOTHING)


def test_a_conversation_remembers_until_reset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from runner.cli import generate

    trained("first")
    heard: list[list[str]] = []
    original = generate.prompt_text
    monkeypatch.setattr(
        generate,
        "prompt_text",
        lambda run, messages: heard.append([m["role"] for m in messages]) or original(run, messages),
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/rest\n/reset\nthree\n/quit\nfour\n"))
    code, _, err = said(capsys, "generate", "first", "--system", "Be brief.", "--max-new-tokens", "3")
    assert code == 0
    assert heard == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert "/rest: no such command" in err


def test_a_run_on_plain_text_continues_it(capsys: pytest.CaptureFixture[str]):
    trained("plain")
    assert said(capsys, "generate", "plain", "Chapter", "--max-new-tokens", "3")[0] == 0
    code, _, err = said(capsys, "generate", "plain", "Chapter", "--system", "x")
    assert (code, "--system" in err) == (2, True)
