"""Answers with the prompt of another row: their log-probabilities give the KL estimate of KTO for a whole step.

The other row is the one before in the data, among all rows of the step, so that neither a cut into micro-batches and
ranks nor packing changes the estimate; the first row gets the last one. (Reversing the order, as other programs do,
pairs the middle of an odd step with itself.)
"""

from __future__ import annotations

import numpy as np

from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.data.packing import IGNORED, Rows, answer_start
from runner.errors import DataError, Fault
from runner.tasks import logprobs
from runner.tasks.step_context import StepContext

MEAN = "z"
"""The name of the estimate in a batch."""


def prepare(context: StepContext) -> list[Batch]:
    """The same micro-batches with ``MEAN``, (): the mean of s - r over the answers of the step with other prompts."""
    partners = dict(zip(distinct := sorted(set(context.order)), distinct[-1:] + distinct[:-1], strict=True))
    rows, longest = context.batches.rows, context.batches.max_length
    mixed = [context.batch([mix(rows, row, partners[row], longest) for row in part]) for part in context.rows]
    difference = 0.0
    for batch in mixed:
        context.agree()
        difference += float(logprobs.sums(context.model, batch).double().sum())
    with context.start() as start:
        difference -= sum(float(logprobs.sums(start, batch).double().sum()) for batch in mixed)
    (total,) = context.agree(difference)
    z = max(total / len(context.order), 0.0)
    return [{**batch, MEAN: batch["label"].new_tensor(z)} for batch in context.micro_batches]


def mix(rows: Rows, row: int, other: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, labels) of the prompt of ``row`` with the answer of ``other``, at most ``longest`` tokens."""
    (ids, labels), (other_ids, other_labels) = rows[row], rows[other]
    prompt, start = ids[: answer_start(labels)], answer_start(other_labels)
    masked = np.full_like(prompt, IGNORED)
    parts = (prompt, other_ids[start:]), (masked, other_labels[start:])
    mixed_ids, mixed_labels = (np.concatenate(part)[:longest] for part in parts)
    return mixed_ids, mixed_labels


def refuse_lonely_rows(training: Batches, evaluation: Batches, steps: int) -> None:
    """Each row needs another one in its step, and in the evaluation.

    Raises:
        DataError: a step, or the evaluation, has a single row.
    """
    needs = "and the KL estimate needs two: the answer of one with the prompt of another"
    if len(evaluation.rows) < 2:
        raise DataError(Fault("data", f"one row is held out, {needs}", "raise data.eval_fraction, or add rows"))
    for i in range(steps):
        if len(set(training.rows_in(training.order.packs_of_step(i)))) < 2:
            remedy = "raise train.per_device_batch_size, change data.train_rows, or use loss_type=apo_zero_unpaired"
            raise DataError(Fault("train.per_device_batch_size", f"step {i + 1} has a single row, {needs}", remedy))
