"""Metrics of classification and regression from sums."""

from __future__ import annotations

import pytest
import torch

from runner.tasks import classification_metrics


def test_metrics_do_not_depend_on_the_cut_and_are_right() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 3), torch.randint(0, 3, (40, 1)).float()
    many = torch.randint(0, 2, (40, 3)).float()
    numbers = {"single": (logits, targets), "multi": (logits, many), "regression": (logits[:, :1], logits[:, 1:2])}
    results = {}
    for kind, (x, y) in numbers.items():
        with torch.no_grad():
            parts = [classification_metrics.sums(kind, x[at : at + 7], y[at : at + 7]) for at in range(0, 40, 7)]
        sums = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
        results[kind] = classification_metrics.METRICS[kind]({**sums, "loss": 1.0})
    chosen, actual = logits.argmax(1), targets[:, 0]
    assert results["single"]["accuracy"] == pytest.approx(float((chosen == actual).float().mean()))
    assert results["single"]["majority_accuracy"] == max(float((actual == c).float().mean()) for c in range(3))
    f1 = []
    for c in range(3):
        hits = float(((chosen == c) & (actual == c)).sum())
        precision, recall = hits / float((chosen == c).sum()), hits / float((actual == c).sum())
        f1.append(2 * precision * recall / (precision + recall))
    assert results["single"]["macro_f1"] == pytest.approx(sum(f1) / 3)
    right = (logits > 0) == (many > 0.5)
    assert results["multi"]["accuracy"] == pytest.approx(float(right.all(1).float().mean()))
    assert results["multi"]["label_accuracy"] == pytest.approx(float(right.float().mean()))
    x, y = logits[:, 0], logits[:, 1]
    assert results["regression"]["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
    assert results["regression"]["mae"] == pytest.approx(float((x - y).abs().mean()), abs=1e-6)
    assert results["regression"]["mean_loss"] == pytest.approx(float(y.var(unbiased=False)), abs=1e-6)
