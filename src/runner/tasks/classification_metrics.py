"""Metrics of classification and regression, from sums that can be added over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from runner.tasks.task import Measures

Sums = dict[str, float]
SUMMARY: Mapping[str, tuple[str, ...]] = {
    "single": ("accuracy", "majority_accuracy", "macro_f1"),
    "multi": ("accuracy", "label_accuracy", "majority_label_accuracy", "macro_f1"),
    "regression": ("mae", "pearson", "mean_loss"),
}
"""The metrics shown at the end, with what a constant answer reaches on the same rows."""
OF_CLASSES: Measures = {"loss": "minimize", "accuracy": "maximize", "macro_f1": "maximize"}
MEASURES: Mapping[str, Measures] = {
    "single": OF_CLASSES,
    "multi": {**OF_CLASSES, "label_accuracy": "maximize"},
    "regression": {
        "loss": "minimize", "mse": "minimize", "mae": "minimize", "pearson": "maximize",
    },
}  # fmt: skip


def sums(kind: Literal["single", "multi", "regression"], outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """``outputs`` (documents, outputs), ``targets`` (documents, 1 or outputs); for each class only in evaluations."""
    count = torch.full((), len(outputs), device=outputs.device)
    if kind == "regression":
        x, y = outputs[:, 0].double(), targets[:, 0].double()
        moments = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "distance": (x - y).abs()}
        return {"documents": count, **{name: value.sum() for name, value in moments.items()}}
    if kind == "single":
        classes, expected = outputs.shape[1], targets[:, 0].long()
        chosen = outputs.argmax(1)
        parts = {"documents": count, "correct": (chosen == expected).sum()}
        predicted, actual = one_hot(chosen, classes).bool(), one_hot(expected, classes).bool()
    else:
        predicted, actual = outputs > 0, targets > 0.5  # (documents, classes)
        parts = {"documents": count, "correct": (predicted == actual).all(1).sum()}
    if torch.is_grad_enabled():
        return parts
    tables = {"hits": predicted & actual, "predicted": predicted, "actual": actual}
    of_classes = {f"{name}/{i}": n for name, table in tables.items() for i, n in enumerate(table.sum(0).unbind())}
    return {**parts, **of_classes}


def _classes(sums: Sums) -> tuple[dict[str, float], list[float]]:
    """(loss, accuracy and, if the classes are counted, macro F1; how many documents each class has)."""
    count = max(sums["documents"], 1.0)
    metrics = {"loss": sums["loss"] / count, "accuracy": sums["correct"] / count}
    actual = [value for name, value in sums.items() if name.startswith("actual/")]
    if actual:
        both = [sums[f"predicted/{i}"] + sums[f"actual/{i}"] for i in range(len(actual))]
        scores = [2 * sums[f"hits/{i}"] / total for i, total in enumerate(both) if total]
        metrics["macro_f1"] = sum(scores) / max(len(scores), 1)
    return metrics, actual


def single(sums: Sums) -> dict[str, float]:
    """Loss, accuracy, mean F1 of the classes that occur, and the accuracy of always choosing the most frequent one."""
    metrics, actual = _classes(sums)
    return {**metrics, **({"majority_accuracy": max(actual) / max(sums["documents"], 1.0)} if actual else {})}


def multi(sums: Sums) -> dict[str, float]:
    """Loss, share of documents with all labels right (``accuracy``), share of right labels, mean F1; and the share of
    right labels if each is chosen always or never."""
    metrics, actual = _classes(sums)
    if not actual:
        return metrics
    count, labels = max(sums["documents"], 1.0), len(actual)
    wrong = sum(sums[f"predicted/{i}"] + sums[f"actual/{i}"] - 2 * sums[f"hits/{i}"] for i in range(labels))
    majority = sum(max(each, count - each) for each in actual) / (labels * count)
    return {**metrics, "label_accuracy": 1 - wrong / (labels * count), "majority_label_accuracy": majority}


def regression(sums: Sums) -> dict[str, float]:
    """Mean squared error (``loss``, ``mse``), mean absolute error, Pearson's correlation, and the squared error of
    always answering the mean (``mean_loss``)."""
    n = max(sums["documents"], 1.0)
    mean_x, mean_y = sums["x"] / n, sums["y"] / n
    spread_x, spread_y = (max(sums[2 * axis] / n - mean**2, 0.0) for axis, mean in (("x", mean_x), ("y", mean_y)))
    together = sums["xy"] / n - mean_x * mean_y
    pearson = together / (spread_x * spread_y) ** 0.5 if spread_x * spread_y > 0 else 0.0
    error = sums["loss"] / n
    return {"loss": error, "mse": error, "mae": sums["distance"] / n, "pearson": pearson, "mean_loss": spread_y}


METRICS: Mapping[str, Callable[[Sums], dict[str, float]]] = {
    "single": single, "multi": multi, "regression": regression,
}  # fmt: skip
