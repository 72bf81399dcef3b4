"""Which evaluation of a run is the best, whose weights become the result, and when training ends before its last step.

The rules are functions of the metrics and of ``Progress``, which checkpoints contain: a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runner.config.schema import TrainSettings
from runner.errors import Fault, TrainingError, suggest
from runner.train.checkpoint import Progress


@dataclass(frozen=True)
class Selection:
    """The keys of ``train`` that decide it."""

    metric: str | None
    """Such as eval/loss; None: the weights of the last step are the result."""
    is_larger_better: bool
    patience: int | None
    """Evaluations in a row without a better one after which training ends."""
    threshold: float
    """By how much an evaluation must be better to count for ``patience``, as in transformers."""
    highest_loss: float | None
    high_losses: int
    """Steps in a row above ``highest_loss`` that are an error."""

    @classmethod
    def of(cls, settings: TrainSettings, *, is_larger_better: bool) -> Selection:
        return cls(
            settings.metric_for_best_model, is_larger_better, settings.early_stopping_patience,
            settings.early_stopping_threshold, settings.loss_watchdog_threshold, settings.loss_watchdog_patience,
        )  # fmt: skip

    def evaluated(self, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Note an evaluation in ``progress``: whether it is the best one, and whether it ends the training.

        The model before the first step is not a result of training, and NaN is never the best.

        Raises:
            TrainingError: the evaluation has no such metric.
        """
        if self.metric is None:
            return
        if (value := metrics.get(self.metric)) is None:
            remedy = f"{suggest(self.metric, metrics)} metrics: {', '.join(metrics)}".strip()
            problem = "is not among the metrics of the evaluation"
            raise TrainingError(Fault("train.metric_for_best_model", problem, remedy, self.metric))
        if progress.step == 0:
            return
        gain = self._gain(value, progress.best_value)
        progress.without_gain = 0 if gain > self.threshold else progress.without_gain + 1
        if gain > 0:
            progress.best_step, progress.best_value = progress.step, value
        if self.patience is not None and progress.without_gain >= self.patience:
            best = f", at step {progress.best_step} it was {progress.best_value:.4g}" if progress.best_step else ""
            progress.ended = f"stopped early at step {progress.step}: {self.metric} is {value:.4g}{best}"

    def _gain(self, value: float, best: float | None) -> float:
        """By how much ``value`` is better than ``best``; not above 0 if it is not."""
        if math.isnan(value):
            return -math.inf
        if best is None:
            return math.inf
        return value - best if self.is_larger_better else best - value

    def stepped(self, progress: Progress, step: int, loss: float) -> None:
        """Note the loss of a training step.

        Raises:
            TrainingError: the loss was too high for too many steps.
        """
        if self.highest_loss is None:
            return
        progress.high_losses = progress.high_losses + 1 if loss > self.highest_loss else 0
        if progress.high_losses >= self.high_losses:
            steps = f"{self.high_losses} steps in a row" if self.high_losses > 1 else "1 step"
            problem = f"the loss was above {self.highest_loss:g} for {steps}, it is {loss:.4g} at step {step}"
            remedy = (
                "lower optim.learning_rate, look at the data of these steps, or raise train.loss_watchdog_threshold"
            )
            raise TrainingError(Fault("train.loss_watchdog_threshold", problem, remedy))
