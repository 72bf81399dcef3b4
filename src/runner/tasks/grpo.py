"""GRPO and RLOO: learn from rewards for answers that the model writes itself.

G answers to each prompt are compared with each other: that is the advantage A of their tokens. rho is the probability
of a token divided by that under the policy that wrote it. See https://arxiv.org/abs/2402.03300 (GRPO), 2503.14476
(DAPO), 2503.20783 (Dr. GRPO), 2507.18071 (GSPO), 2506.13585 (CISPO), 2402.14740 (RLOO).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Len
from torch import Tensor

from runner.config import user_function
from runner.config.schema import COMPUTABLE, COUNTABLE, Count, Fraction, NotNegative, Positive, Text
from runner.data.batches import Batches
from runner.data.examples import Answers
from runner.errors import Fault
from runner.tasks import policy_loss, prompt_encoding, rollout
from runner.tasks.logit_losses import Shaping
from runner.tasks.reward_functions import KEY, Rewards
from runner.tasks.task import Divisor, Task, token_losses

LossType = Literal["dapo", "grpo", "dr_grpo", "cispo", "rloo"]
DIVISORS: dict[str, Divisor] = {"dapo": "trained", "cispo": "trained"}
"""The divisor of the loss; for other types the number of answers."""


def grpo(
    *,
    rewards: Annotated[list[Text], Len(1)],
    reward_weights: list[Annotated[float, COMPUTABLE]] | None,
    reward_timeout_s: Positive,
    num_generations: Annotated[int, Ge(2), COUNTABLE],
    max_completion_length: Count,
    temperature: Positive,
    loss_type: LossType,
    scale_rewards: rollout.Scale,
    beta: NotNegative,
    num_iterations: Count,
    epsilon: Fraction | None,
    epsilon_high: Positive | None,
    importance_sampling_level: Literal["token", "sequence"],
    mask_truncated: bool,
    _code_: list[str] | None = None,
) -> Task:
    """Policy gradients on answers of the model's own, scored by the functions ``rewards``; see conf/task/grpo.yaml."""
    is_rloo = loss_type == "rloo"
    scores = Rewards(rewards, tuple(_code_ or ()), reward_weights or [1.0] * len(rewards), reward_timeout_s)
    how = rollout.Rollout(
        scores, num_generations, max_completion_length, temperature, "others" if is_rloo else "mean", scale_rewards,
        beta if is_rloo else 0.0, mask_truncated, num_iterations > 1, beta > 0,
    )  # fmt: skip
    lower, upper = (epsilon, epsilon if epsilon_high is None else epsilon_high)
    of_loss = {"kl": beta > 0 and not is_rloo, "clip_ratio": lower is not None or upper is not None}
    trained = (*rollout.METRICS, *(name for name, is_logged in of_loss.items() if is_logged))

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        statistics = batch.get(rollout.STATISTICS, {})
        if "labels" not in batch:  # an evaluation: its answers are scored, and that is all
            return {name: torch.tensor(float(value)) for name, value in statistics.items()}
        new, lengths = -token_losses(model, batch, Shaping(temperature=temperature)).nll, batch["labels_per_document"]
        advantage = batch.get("advantage", new.new_zeros(len(lengths)))
        log_ratio = new - batch.get("old", new.detach())
        start = batch.get("start") if not is_rloo else None
        token, clipped, kl = policy_loss.token_loss(
            new, log_ratio, advantage, lengths, start, loss_type, importance_sampling_level, beta, lower, upper
        )
        return {
            "loss": policy_loss.reduced(token, lengths, loss_type, max_completion_length),
            "loss_count": lengths.sum() if loss_type in DIVISORS else torch.full((), len(lengths), device=new.device),
            "tokens": lengths.sum(),
            "entropy": -new.detach().sum(),
            **({"kl": kl.detach().sum()} if kl is not None else {}),
            **({"clip_ratio": clipped.sum()} if of_loss["clip_ratio"] else {}),
            **{name: torch.tensor(float(value), device=new.device) for name, value in statistics.items()},
        }

    def inspect(training: Batches, evaluation: Batches, steps: int) -> list[tuple[str, str]]:
        assert training.rows.records is not None
        record = rollout.record_of(training.rows.records, 0)
        answer = str(record["answer"] or "")
        # Two answers: a function that returns one number for all of them is refused here.
        values, _ = rollout.scored(scores, [record] * 2, [answer] * 2, [[], []])
        which = "the reference answer" if answer else "an empty answer"
        listed = ", ".join(f"{name} {value:g}" for name, value in zip(scores.names, values, strict=True))
        return [("rewards", f"{listed} for {which} to the first prompt")]

    return Task(
        name="rloo" if is_rloo else "grpo",
        packable=False,
        encode=prompt_encoding.encode,
        prompt=prompt_encoding.prompt,
        loss=loss,
        metrics=rollout.metrics,
        divisors={"loss": DIVISORS.get(loss_type, "documents")},
        answers=Answers(num_generations, max_completion_length),
        updates=num_iterations,
        prepare=how.prepare,
        needs_start=beta > 0,
        passes_without_gradient=1 + (num_iterations > 1 or how.kl_in_reward > 0) + (beta > 0),
        inspect=inspect,
        maxima=rollout.MAXIMA,
        train_metrics=("loss", *trained, *(f"rewards/{name}" for name in scores.names)),
        summary=("reward", "completions/mean_length"),
        measures={**rollout.OF_ANSWERS, **{f"rewards/{name}": "maximize" for name in scores.names}},
    )


def check_grpo(
    *, rewards: list[str], reward_weights: list[float] | None, num_iterations: int, epsilon: float | None,
    epsilon_high: float | None, importance_sampling_level: str, loss_type: str, _code_: list[str] | None = None,
    **_: object,
) -> Iterator[Fault]:  # fmt: skip
    """The functions exist; keys that act only on answers that are used several times have no value otherwise."""
    names = [reference.rpartition(":")[2] for reference in rewards]
    for reference in rewards:
        yield from user_function.faults("rewards", reference, _code_ or (), f"{KEY}=[rewards.py:is_short]")
    if len(set(names)) < len(names):
        yield Fault("rewards", "has two functions of the same name", "rename one: metrics have these names", rewards)
    if reward_weights is not None and len(reward_weights) != len(rewards):
        remedy = f"give {len(rewards)} weights, or null: all equal"
        yield Fault("reward_weights", f"has {len(reward_weights)} weights", remedy, reward_weights)
    clips = {"epsilon": epsilon, "epsilon_high": epsilon_high}
    if num_iterations == 1:
        problem = "has no effect with task.num_iterations=1: the policy is still the one that wrote the answers"
        for key, value in clips.items():
            if value is not None:
                yield Fault(key, problem, f"set task.{key}=null, or raise task.num_iterations", value)
        if importance_sampling_level != "token" and loss_type != "rloo":
            remedy = "set it to token, or raise task.num_iterations"
            yield Fault("importance_sampling_level", problem, remedy, importance_sampling_level)
    elif loss_type == "cispo" and (epsilon is not None or epsilon_high is None):
        yield Fault("epsilon_high", "cispo needs it, and no epsilon", "set task.epsilon=null task.epsilon_high=5.0")
    elif loss_type != "cispo" and epsilon is None:
        yield Fault("epsilon", "needs a value with task.num_iterations > 1", "set task.epsilon=0.2")
    if loss_type == "rloo" and importance_sampling_level != "token":
        remedy = "set it to token: rloo compares whole answers anyway"
        yield Fault("importance_sampling_level", "has no effect with rloo", remedy, importance_sampling_level)
