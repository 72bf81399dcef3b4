"""Classification and regression: a class, several classes, or a number for a text or a conversation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from runner.config.schema import Fraction, Positive, Ratio, Text
from runner.data.examples import Example, Features, misfit, options
from runner.errors import DataError, Fault
from runner.models.kernels.score_head import Problem, ScoreHead
from runner.tasks import classification_metrics, scores
from runner.tasks.labels import Kind, names_of, order, refuse_alike, targets
from runner.tasks.task import Task, unit_sums_of_sources

Input = Literal["text", "messages"]
PROBLEMS: dict[Kind, Problem] = {
    "single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression",
}  # fmt: skip
MOST = 1000  # classes; more are more likely a wrong column


class Settings(NamedTuple):
    """The keys of the option."""

    kind: Kind
    labels: list[str] | None
    class_weight: Literal["balanced"] | list[float] | None
    label_smoothing: float
    input: Input | None
    head_lr_ratio: float = 1.0


def classify(
    *,
    kind: Kind,
    labels: list[Text | Annotated[int, Ge(-(2**63)), Lt(2**63)]] | None,
    class_weight: Literal["balanced"] | list[Positive] | None,
    label_smoothing: Fraction,
    input: Input | None,
    head_lr_ratio: Ratio = 1.0,
) -> Task:
    """``kind``: one class of several (cross entropy), any number of classes (binary cross entropy of each), or a number
    (squared error), each a mean over the documents of a step.

    ``labels``: the classes; null: those of the training rows. ``class_weight``: balanced gives each class the same
    weight in the loss, with a mean of 1 over the training rows. ``input``: what the rows have; null: as they are.
    ``head_lr_ratio``: how many times as fast as all other weights the head learns.
    """
    names = [str(label) for label in labels] if labels is not None else None
    return _task(Settings(kind, names, class_weight, label_smoothing, input, head_lr_ratio))


def check_classify(
    *, kind: Kind, labels: list[str] | None, class_weight: Any, label_smoothing: float, **_: object
) -> Iterator[Fault]:
    used = {"class_weight": class_weight, "label_smoothing": label_smoothing or None} if kind != "single" else {}
    for key, value in {**used, **({"labels": labels} if kind == "regression" else {})}.items():
        if value is not None:
            remedy = f"set task.{key}={'0' if key == 'label_smoothing' else 'null'}"
            yield Fault(key, f"has no effect with kind={kind}", remedy, value)
    if labels is not None and (
        len(set(map(str, labels))) < len(labels) or len(labels) < (2 if kind == "single" else 1)
    ):
        yield Fault("labels", "needs two classes or more, each once", "correct it, or set task.labels=null", labels)
    if isinstance(class_weight, list) and len(class_weight) != len(labels or ()):
        remedy = "give one weight for each class of task.labels, or set task.class_weight=balanced"
        yield Fault("class_weight", "does not have one weight for each class", remedy, class_weight)


def _task(s: Settings) -> Task:
    outputs = ("value",) if s.kind == "regression" else tuple(s.labels or ())
    columns = tuple(f"target_{i}" for i in range(len(outputs))) if s.kind == "multi" else ("target",)

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        logits = scores.of_documents(model, batch)  # (documents, outputs)
        targets = torch.stack([batch[column] for column in columns], 1)  # (documents, 1), or (documents, outputs)
        losses = document_loss(s, logits, targets)
        measured = classification_metrics.sums(s.kind, logits.detach(), targets)
        return {"loss": losses.sum(), **measured, **unit_sums_of_sources(batch, losses)}

    return Task(
        name="classify",
        packable=True,
        encode=lambda example, tokenizer, _: [_encode(s, example, tokenizer)],
        prompt=scores.no_prompt,
        loss=loss,
        metrics=classification_metrics.METRICS[s.kind],
        divisors={"loss": "documents"},
        values=columns,
        head=ScoreHead(outputs, PROBLEMS[s.kind], allows_encoders=True, lr_ratio=s.head_lr_ratio),
        settle=lambda examples: settle(s, examples),
        settled={"labels": s.labels, "class_weight": s.class_weight, "input": s.input},
        chats=s.input == "messages",
        train_metrics=("loss",) if s.kind == "regression" else ("loss", "accuracy"),
        summary=classification_metrics.SUMMARY[s.kind],
        measures=classification_metrics.MEASURES[s.kind],
    )


def document_loss(s: Settings, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each document (documents,)."""
    if s.kind == "regression":
        return (logits - targets).square().sum(1)
    if s.kind == "multi":
        return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    weight = torch.tensor(s.class_weight, device=logits.device) if isinstance(s.class_weight, list) else None
    smoothing = s.label_smoothing
    return cross_entropy(logits, targets[:, 0].long(), weight, label_smoothing=smoothing, reduction="none")


def settle(s: Settings, examples: Sequence[Any]) -> Task:
    """The task with the classes, the weights and the kind of input of these training examples."""
    rows = [example for example in examples if isinstance(example, dict) and "label" in example]
    if s.input is None and rows:
        s = s._replace(input="text" if isinstance(rows[0]["prompt"], str) else "messages")
    if s.kind == "regression" or not rows:
        return _task(s)
    counts = Counter(name for row in rows for name in names_of(row["label"], s.kind) or ())
    if s.labels is None:
        refuse_alike(counts)
        s = s._replace(labels=sorted(counts, key=order))
    assert s.labels is not None
    if len(counts) < (2 if s.kind == "single" else 1) or len(s.labels) > MOST:
        problem = f"the training rows have {len(counts)} of {len(s.labels)} classes, of 2 to {MOST} that are possible"
        remedy = "name the column of the labels with data.format.label; for numbers: task.kind=regression"
        raise DataError(Fault("task.labels", problem, remedy, ", ".join(list(counts)[:8])))
    if s.class_weight == "balanced":
        if missing := [name for name in s.labels if not counts[name]]:
            problem = f"balanced needs rows of each class, and there are none of {', '.join(missing[:8])}"
            raise DataError(Fault("task.class_weight", problem, "set it to null, or to a list of weights", "balanced"))
        s = s._replace(class_weight=[len(rows) / (len(s.labels) * counts[name]) for name in s.labels])
    return _task(s)


def _encode(s: Settings, example: Example, tokenizer: Any) -> Features:
    if not isinstance(example, dict) or "label" not in example or "completion" in example:
        raise misfit(example, "labels (data/format=label: {text, label} or {messages, label})")
    given: Any = example["prompt"]
    if (kind := "text" if isinstance(given, str) else "messages") != s.input:
        raise DataError(Fault("", f"is {kind}, and the other rows are {s.input}", "use rows of one kind"))
    more = options(example)
    ids = tokenizer(given, verbose=False)["input_ids"] if kind == "text" else scores.tokens(given, tokenizer, more)
    return scores.features(list(ids), **targets(s.kind, s.labels or (), example["label"]))
