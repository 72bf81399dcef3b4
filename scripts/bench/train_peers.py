"""The sides of ``train.py`` that are not runner's: TRL's trainers, and a plain loop over PEFT."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_sides
from train_sides import ANSWERS, GENERATIONS, LONGEST_ANSWER, PROMPTS, TRL, batching


def train_plainly(folder: Path, steps: int) -> None:
    """PEFT and bitsandbytes as their documentation shows them; four rows a step, padded to the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = json.loads((folder / "rows.json").read_text())
    times, cpu, losses = [], [], []
    model = adapted(rows, torch.float32).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    for step in range(steps):
        batch = rows["documents"][4 * step : 4 * step + 4]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in batch], True, rows["pad"])
        labels = pad_sequence([torch.tensor(row["labels"]) for row in batch], True, -100)
        mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in batch], True, 0)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.time())
        cpu.append(time.process_time())
    write_result(folder, times, cpu, losses)


def train_with_trl(folder: Path, side: str, steps: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    rows, options, form = json.loads((folder / "rows.json").read_text()), TRL[side], batching(side)
    compute = torch.float32 if options.get("bf16") is False else torch.bfloat16
    model = adapted(rows, compute, has_score=form == "rewards", full=train_sides.is_full(side))
    times: list[float] = []
    cpu: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.time())
            cpu.append(time.process_time())

    os.environ["WANDB_MODE"] = "disabled"
    trainer_class, config_class, given, arguments = {
        "pairs": dpo, "rewards": reward, "prompts": grpo,
    }.get(form, sft)()  # fmt: skip
    args = config_class(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # as shipped it refuses to start on a CPU
        save_strategy="no",
        train_sampling_strategy="sequential",
        **given,
        **options,
    )
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows[form]),
        processing_class=AutoTokenizer.from_pretrained(rows["model"]),
        callbacks=[Clock()],
        **arguments,
    )
    if form == "prompts":
        draw_as_runner(trainer, rows[form])
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    answers = [entry.get("completions/mean_length", 0.0) * ANSWERS for entry in history]
    rewards = [entry.get("reward", entry["loss"]) for entry in history]
    write_result(folder, times, cpu, rewards, answers if any(answers) else None)


def write_result(
    folder: Path, times: list[float], cpu: list[float], losses: list[float], tokens: list[float] | None = None
) -> None:
    from runner.train.memory import usage

    peak = next(iter(usage.metrics().values()))
    result = {"time": times, "cpu": cpu, "losses": losses, "peak_gib": peak, "tokens": tokens}
    (folder / "result.json").write_text(json.dumps(result))


def adapted(rows: dict[str, Any], compute: Any, *, has_score: bool = False, full: bool = False) -> Any:
    """The model as PEFT adapts it, quantized by bitsandbytes if chosen; ``has_score``: with runner's new score head;
    ``full``: without an adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four["bnb_4bit_compute_dtype"] = compute
    options = {"none": None, "int8 (bitsandbytes)": {"load_in_8bit": True}, "nf4 (bitsandbytes)": four}
    chosen = options[rows["quant"]]
    quantized = BitsAndBytesConfig(**chosen) if chosen else None
    of_head = {"num_labels": 1, "pad_token_id": rows["pad"]} if has_score else {}
    load: Any = AutoModelForSequenceClassification if has_score else AutoModelForCausalLM
    model = load.from_pretrained(rows["model"], dtype=torch.float32, quantization_config=quantized, **of_head)
    if has_score:
        from runner.models.kernels import score_head

        score_head.initialise(model, ["score.weight"], score_head.ScoreHead(("reward",), "regression"))
    if full:
        return model
    torch.manual_seed(0)
    kind = "SEQ_CLS" if has_score else "CAUSAL_LM"
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type=kind)
    return get_peft_model(model, lora)


# (trainer, its configuration, options that let it take tokens, more arguments of the trainer)


def sft() -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import trl

    return trl.SFTTrainer, trl.SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}, {}


def dpo() -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import trl

    class Given(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Given, trl.DPOConfig, {"max_length": None}, {}


def reward() -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import trl

    return trl.RewardTrainer, trl.RewardConfig, {"max_length": None}, {}


def grpo() -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import trl

    from runner.tasks.example_rewards import lowercase_share

    return trl.GRPOTrainer, trl.GRPOConfig, {"shuffle_dataset": False}, {"reward_funcs": lowercase_share}


def draw_as_runner(trainer: Any, prompts: list[dict[str, Any]]) -> None:
    """Let the model of this trainer write the answers that runner's writes, with runner's sampler and its numbers."""
    import torch

    from runner.tasks import sampling

    generate: Callable[..., Any] = trainer.model.generate

    def drawn(**given: Any) -> Any:
        step = trainer.state.global_step
        of_step = prompts[PROMPTS * step : PROMPTS * (step + 1)]
        numbers = [each["row"] for each in of_step]
        chances = sampling.uniforms(of_step[0]["seed"], numbers, GENERATIONS, LONGEST_ANSWER)
        start = given["input_ids"].shape[1]
        choose = sampling._choose(torch.from_numpy(chances).to(given["input_ids"].device), start, 1.0)
        given["generation_config"].do_sample = False
        return generate(**given, logits_processor=[choose])

    trainer.model.generate = drawn
    assert trainer.args.steps_per_generation == 1, train_sides.__doc__
