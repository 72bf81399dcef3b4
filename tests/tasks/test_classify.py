"""Classification and regression against transformers' own losses, and runs from training to the exported model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, prepared
from fixtures import two_models, versions
from fixtures.searches import searchable_is_logged

from runner.cli import main
from runner.data import labelled
from runner.data.batches import Batches
from runner.errors import ConfigError, DataError, Preempted
from runner.models import pretrained, sources, tokenizer_files
from runner.models.kernels import attention, score_head
from runner.models.quantization import none
from runner.signals import Stop
from runner.tasks import classify, scores
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import worker
from runner.train.inputs import inputs
from runner.train.options import Options

TEXTS = ("a", "two words", "a longer text of several words", "?", "yes and no", "the end of it all")
LABELS: dict[str, list[Any]] = {
    "single": ["red", "green", "blue", "red", "red", "green"],
    "multi": [["a"], ["a", "b"], [], ["c"], ["b", "c"], ["a", "b", "c"]],
    "regression": [0.5, -1.25, 3, 0.0, 2.5, 1.0],
}
KEYS = {"text": "text", "prompt": "prompt", "messages": "messages", "label": "label"}


def examples(kind: str) -> list[Any]:
    return [labelled.label({"text": t, "label": y}, **KEYS) for t, y in zip(TEXTS, LABELS[kind], strict=True)]


def task_of(kind: str, **changes: Any) -> Any:
    keys = {"labels": None, "class_weight": None, "label_smoothing": 0.0, "input": None}
    return classify.classify(kind=kind, **{**keys, **changes}).settle(examples(kind))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A BERT for masked language modelling, as those that are published, with tiny's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder_of_bert = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape)
    BertForMaskedLM(config).save_pretrained(folder_of_bert)
    tokenizer.save_pretrained(folder_of_bert)
    return folder_of_bert


def loaded(folder: Path, task: Any) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    keys = {"revision": None, "dtype": "float32", "attention": "auto", "trust_remote_code": False}
    source = replace(sources.pretrained(path=str(folder), **keys), head=task.head)
    return pretrained.load(source, none.none(), "cpu").eval(), tokenizer_files.load(source)


def batches(task: Any, kind: str, tokenizer: Any, **layout: Any) -> Batches:
    features = [each for example in examples(kind) for each in task.encode(example, tokenizer, 128)]
    return two_models.batches(features, capacity=128, values=task.values, pad_id=tokenizer.pad_token_id, **layout)


def step(model: Any, task: Any, given: Batches) -> tuple[float, torch.Tensor]:
    """(loss, gradient of all parameters) of one step."""
    return two_models.step(model, task, given.step(0))[1:]


def loss_of_transformers(folder: Path, model: Any, task: Any, kind: str, tokenizer: Any) -> float:
    """AutoModelForSequenceClassification with right padding and ``labels=``."""
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(folder, config=model.config, **versions.FLOAT32).eval()
    plain.load_state_dict(model.state_dict())
    inputs = tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt")
    targets = torch.tensor([[task.encode(e, tokenizer, 128)[0][name] for name in task.values] for e in examples(kind)])
    labels = {"single": targets[:, 0].long(), "multi": targets, "regression": targets}[kind]
    with torch.no_grad():
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return float(plain(**ids, labels=labels).loss)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("base", ["decoder", "encoder"])
def test_the_loss_is_that_of_transformers(folder: Path, encoder: Path, kind: str, base: str) -> None:
    task, path = task_of(kind), folder if base == "decoder" else encoder
    model, tokenizer = loaded(path, task)
    expected = loss_of_transformers(path, model, task, kind, tokenizer)
    loss, gradient = step(model, task, batches(task, kind, tokenizer, packing=False, at_once=6))
    assert loss == pytest.approx(expected, abs=1e-5)
    ways = [{"packing": False, "at_once": 1}, {"packing": False, "at_once": 3}]
    if base == "decoder":
        ways.append({"packing": True, "at_once": 1})
    for way in ways:
        again, other = step(model, task, batches(task, kind, tokenizer, **way))
        assert again == pytest.approx(loss, rel=1e-5), way
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_smoothing_and_weights_are_those_of_torch(folder: Path) -> None:
    task = task_of("single", class_weight="balanced", label_smoothing=0.1)
    assert task.settled["labels"] == ["blue", "green", "red"]
    assert task.settled["class_weight"] == pytest.approx([6 / 3, 6 / 6, 6 / 9])
    model, tokenizer = loaded(folder, task)
    (batch,) = batches(task, "single", tokenizer, packing=False, at_once=6).step(0)
    with torch.no_grad():
        logits = scores.of_documents(model, batch)
        weight = torch.tensor(task.settled["class_weight"])
        targets = torch.tensor([2, 1, 0, 2, 2, 1])
        expected = torch.nn.functional.cross_entropy(logits, targets, weight, label_smoothing=0.1, reduction="sum")
    loss, _ = step(model, task, batches(task, "single", tokenizer, packing=False, at_once=6))
    assert loss == pytest.approx(float(expected) / 6, abs=1e-6)


def test_rows_that_do_not_fit_are_refused(folder: Path) -> None:
    task = task_of("single")
    _, tokenizer = loaded(folder, task)

    def refused(problem: str, row: dict[str, Any], of: Any = task) -> None:
        with pytest.raises(DataError, match=problem):
            of.encode(labelled.label(row, **KEYS), tokenizer, 64)

    refused("unknown label 'pink'", {"text": "a", "label": "pink"})
    refused("not a text or a whole number", {"text": "a", "label": 0.5})
    refused("not a list", {"text": "a", "label": "a"}, task_of("multi"))
    for label in ("one", 1e300, 10**400, True):
        refused("not a finite number", {"text": "a", "label": label}, task_of("regression"))
    written = task_of("regression").encode(labelled.label({"text": "a", "label": "0.5"}, **KEYS), tokenizer, 64)
    assert written[0]["target"] == 0.5
    refused("has a class twice", {"text": "a", "label": [0, 1, 0]}, task_of("multi"))
    refused("is messages", {"prompt": "a", "label": "red"})
    refused("finds nothing .* under 'label'", {"text": "a"})
    refused("finds nothing .* under 'text'", {"label": "red"})
    refused("several texts", {"text": "a", "prompt": "b", "label": "red"})
    refused("is empty", {"text": " ", "label": "red"})
    with pytest.raises(DataError, match="needs labels"):
        task.encode("a text", tokenizer, 64)
    with pytest.raises(DataError, match="1 of 1 classes"):
        classify.settle(classify.Settings("single", None, None, 0.0, None), examples("single")[:1])
    rows = [{"prompt": "a", "label": name} for name in ("red", "green", "Red ")]
    with pytest.raises(DataError, match="'red' and 'Red ', which look like one class"):
        classify.settle(classify.Settings("single", None, None, 0.0, None), rows)
    with pytest.raises(DataError, match="none of pink"):
        task_of("single", labels=["red", "green", "blue", "pink"], class_weight="balanced")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"kind": "multi", "label_smoothing": 0.1}, "no effect with kind=multi"),
        ({"kind": "regression", "labels": ["a", "b"]}, "no effect with kind=regression"),
        ({"kind": "single", "labels": ["a"]}, "two classes"),
        ({"kind": "single", "labels": ["a", "a"]}, "each once"),
        ({"kind": "single", "labels": ["a", "b"], "class_weight": [1.0]}, "one weight for each class"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], problem: str) -> None:
    given = {"labels": None, "class_weight": None, "label_smoothing": 0.0, "input": None, **keys}
    assert any(problem in fault.problem for fault in classify.check_classify(**given))


def written(path: Path, labels: list[Any], count: int = 24) -> str:
    rows = (
        {"text": f"the row {i} is {labels[i % len(labels)]}", "label": labels[i % len(labels)]} for i in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


RUN = ("task=classify", "data=local", "data/format=label", "data.eval_fraction=0.3", "data.max_length=64",
       "train.max_steps=3", "train.per_device_batch_size=2", "model.dtype=float32")  # fmt: skip


def evaluations(rundir: RunDir) -> list[dict[str, float]]:
    return [record for record in metrics_log.read(rundir) if "eval/loss" in record]


@pytest.mark.parametrize("changes", [(), ("lora=none", "data.packing=false"), ("quant=4bit",)])
def test_a_run_fixes_its_classes_and_is_evaluated_and_exported(
    tmp_path: Path, cache: Path, changes: tuple[str, ...]
) -> None:
    from transformers import AutoModelForSequenceClassification

    path = written(tmp_path / "rows.jsonl", [10, 9, 2])
    rundir = prepared(tmp_path / "run", *TINY, *RUN, f"data.path={path}", *changes)
    assert worker.work(rundir) == 0
    last = evaluations(rundir)[-1]
    assert {"eval/accuracy", "eval/macro_f1", "eval/majority_accuracy"} <= last.keys()
    searchable_is_logged(rundir)
    assert rundir.read_manifest()["settled"]["labels"] == ["2", "9", "10"]
    assert main.run(["evaluate", str(rundir.path)]) == 0
    (evaluated,) = metrics_log.read_evaluations(rundir)
    assert evaluated["metrics"]["eval_held_out/loss"] == pytest.approx(last["eval/loss"], abs=1e-5)
    whole = () if "lora=none" in changes else ("--merged",)
    assert main.run(["export", str(rundir.path), str(tmp_path / "whole"), *whole]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert model.config.id2label == {0: "2", 1: "9", 2: "10"}
    held_out = inputs(Options.of(rundir)).splits.eval
    with torch.no_grad():
        losses = [
            float(model(torch.tensor(held_out[row][0].tolist())[None], labels=torch.tensor([int(target)])).loss)
            for row, target in enumerate(held_out.values["target"])
        ]
    if "quant=4bit" not in changes:  # merged into the base as it was before
        assert np.mean(losses) == pytest.approx(last["eval/loss"], abs=1e-5)


def test_an_unknown_label_of_other_data_is_refused_with_its_place(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, others = (written(tmp_path / f"{name}.jsonl", labels) for name, labels in (("rows", "ab"), ("others", "abc")))
    for override in (f"data.eval_path={others}",):
        rundir = prepared(tmp_path / "refused", *TINY, *RUN, f"data.path={rows}", override)
        assert worker.work(rundir) == 2
        assert re.search(r"others.jsonl:\d+: has the unknown label 'c'", capsys.readouterr().err)
    rundir = prepared(tmp_path / "run", *TINY, *RUN, f"data.path={rows}", "train.max_steps=1")
    assert worker.work(rundir) == 0
    assert main.run(["evaluate", str(rundir.path), f"data.path={others}"]) == 2
    assert "unknown label 'c'" in capsys.readouterr().err


def test_a_truncated_document_is_scored_at_the_last_token_that_is_left(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ["a", "b"])
    rundir = prepared(tmp_path / "run", *TINY, *RUN, f"data.path={path}", "data.max_length=12")
    splits = inputs(Options.of(rundir)).splits
    assert splits.report.truncated == 24
    for rows in (splits.train, splits.eval):
        assert rows.labels_per_row.tolist() == [1] * len(rows)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, cache: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ["a", "b"])
    words = (*TINY, *RUN, f"data.path={path}", "task.class_weight=balanced", "train.save_steps=1")
    whole, cut = (prepared(tmp_path / name, *words) for name in ("whole", "cut"))
    assert worker.work(whole) == 0
    stops = iter([False, False, True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(cut) == 75
    assert cut.read_state().step < 3
    assert worker.work(cut) == 0
    hashes = [each.read_manifest()["weights_sha256"] for each in (whole, cut)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("lora", ["lora", "none"])
def test_an_encoder_is_trained_and_its_whole_head_saved(tmp_path: Path, cache: Path, encoder: Path, lora: str) -> None:
    from transformers import AutoModelForSequenceClassification

    path = written(tmp_path / "rows.jsonl", ["a", "b"])
    base = ("model=local", f"model.path={encoder}", f"lora={lora}")
    words = (*RUN, f"data.path={path}", *base, "launcher=local", "tracking=offline", "data.packing=false")
    rundir = prepared(tmp_path / "run", *words, "train.max_steps=2")
    assert worker.work(rundir) == 0
    first, last = evaluations(rundir)
    assert first["eval/loss"] != last["eval/loss"]
    assert main.run(["evaluate", str(rundir.path)]) == 0
    (evaluated,) = metrics_log.read_evaluations(rundir)
    assert evaluated["metrics"]["eval_held_out/loss"] == pytest.approx(last["eval/loss"], abs=1e-5)
    whole = ("--merged",) if lora == "lora" else ()
    assert main.run(["export", str(rundir.path), str(tmp_path / "whole"), *whole]) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").config.id2label == {0: "a", 1: "b"}


def test_an_encoder_is_refused_where_it_cannot_be_used(
    tmp_path: Path, cache: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "rows.jsonl", ["a", "b"])
    base = ("model=local", f"model.path={encoder}", "launcher=local", "tracking=offline", "model.dtype=float32")
    for number, (words, problem) in enumerate([
        ((*RUN, f"data.path={path}", "data.packing=true"), "attends in both directions"),
        (("task=reward", "data=chitchat_pairs", "data.max_length=512"), "this task needs a decoder"),
    ]):  # fmt: skip
        rundir = prepared(tmp_path / f"run{number}", *words, *base)
        assert worker.work(rundir) == 2
        assert problem in " ".join(capsys.readouterr().err.split())


def test_padding_does_not_reach_an_encoder(encoder: Path) -> None:
    model, _ = loaded(encoder, task_of("single"))
    attention.check_padding(model, None)
    original = type(model).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", lambda self, input_ids, **_: original(self, input_ids))
        with pytest.raises(ConfigError, match="padding behind it"):
            attention.check_padding(model, None)


def test_a_classifier_is_continued_only_with_its_own_classes(tmp_path: Path, folder: Path) -> None:
    task = task_of("single")
    model, tokenizer = loaded(folder, task)
    pretrained.save(model, tokenizer, tmp_path / "classifier")
    again, _ = loaded(tmp_path / "classifier", task)
    assert torch.equal(again.score.weight, model.score.weight)
    other = task_of("single", labels=["red", "blue", "green"])
    with pytest.raises(ConfigError, match="head for other classes"):
        loaded(tmp_path / "classifier", other)
    assert score_head.of(again) is again.score
