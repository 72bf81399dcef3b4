"""A registered model against plain transformers: answers, and scores."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from fixtures import two_models, versions
from fixtures.trained_runs import asked_plainly
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from runner.tracking.mlflow import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers depend on the prompt."""
    written = two_models.write(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(written, **versions.FLOAT32)
    for seed in range(6):
        two_models.add_noise(model, seed)
    model.save_pretrained(written)
    return written


def loaded(folder: Path, **config: Any) -> served.Answers:
    model = served.Answers()
    model.load_context(SimpleNamespace(artifacts={"model": str(folder)}, model_config={"is_chat": True, **config}))
    return model


def test_it_imports_nothing_of_this_package() -> None:
    """MLflow copies the file to where the package is not installed."""
    nodes = list(ast.walk(ast.parse(Path(served.__file__).read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {"__future__", "json", "mlflow", "pandas", "pathlib",
                                                            "peft", "torch", "transformers", "typing"}  # fmt: skip


def test_answers_are_those_of_transformers(folder: Path) -> None:
    model = loaded(folder)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = [asked_plainly(plain, tokenizer, text, 5) for text in ("Hello!", "Why?")]
    for given in (["Hello!", "Why?"], pandas.DataFrame({"text": ["Hello!", "Why?"], "other": [1, 2]})):
        assert model.predict(None, given, {"max_new_tokens": 5}) == expected
    assert model.predict(None, "Hello!", {"max_new_tokens": 5}) == expected[:1]
    assert model.predict(None, "Hello!", {"max_new_tokens": 5, "system": "Be brief."}) != expected[:1]


def test_scores_have_the_names_of_the_outputs(folder: Path, tmp_path: Path) -> None:
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, **names).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = [["Hello!", "Hi."], ["Why?", "So."]]
    found = loaded(tmp_path, problem="single_label_classification").predict(None, pandas.DataFrame(rows))
    for row, (question, answer) in zip(found.to_dict("records"), rows, strict=True):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            expected = plain(input_ids=ids).logits[0].double().softmax(-1).tolist()
        assert row == pytest.approx({"good": expected[0], "bad": expected[1]}, abs=1e-6)
    raw = loaded(tmp_path, problem="regression").predict(None, pandas.DataFrame(rows))
    assert abs(raw.sum(axis=1) - 1).min() > 1e-3, "numbers, and no probabilities"
