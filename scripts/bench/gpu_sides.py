"""One training, or the ceilings of a device, in this process: what ``gpu.py`` lets take turns.

python scripts/bench/gpu_sides.py CASE SIDE RESULT.json --steps N [--rows N] [--small]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

WARM_UP = 5
"""Steps that do not count: compilation, the choice of kernels, what the allocator learns."""
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Case:
    """A training, but for who does it."""

    shape: dict[str, Any]
    quant: str = "none"
    lora: int | None = 16
    """The rank; None: all weights train."""
    length: int = 4096
    rows: int = 2
    """Packs of ``length`` tokens in a step."""
    documents: int = 32
    """Documents in a step, where they are not packed."""
    short: bool = False
    sides: tuple[str, ...] = ("ours", "trl", "trl-tuned")


def llama(
    hidden: int, wide: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }


LLAMA_1B = llama(2048, 8192, 16, 32, 8, 128256, True)
LLAMA_8B = llama(4096, 14336, 32, 32, 8, 128256, False)
SMOLLM2 = llama(576, 1536, 30, 9, 3, 49152, True)
TINY = llama(64, 128, 2, 4, 2, 512, True)
CASES = {
    "1b-full": Case(LLAMA_1B, lora=None, rows=4, sides=("ours", "ours-auto", "trl", "trl-tuned")),
    "8b-lora": Case(LLAMA_8B),
    "8b-qlora": Case(LLAMA_8B, quant="4bit"),
    "short": Case(LLAMA_8B, short=True, sides=("ours", "trl-packed", "ours-documents", "trl")),
    "small": Case(
        SMOLLM2, lora=8, length=1024, rows=4, sides=("ours", "ours-eager", "trl", "trl-tuned", "trl-compiled")
    ),
}
OURS: dict[str, list[str]] = {
    "ours": ["compile=regional"],
    "ours-eager": ["compile=none"],
    "ours-auto": ["compile=regional", "model.dtype=auto"],  # full fine-tuning as it is by default: float32, autocast
    "ours-balanced": ["compile=regional", "train.memory=balanced"],
    "ours-documents": ["compile=none", "data.packing=false"],
}
TUNED = {"gradient_checkpointing": False, "use_liger_kernel": True, "optim": "adamw_torch_fused"}
TRL: dict[str, dict[str, Any]] = {
    "trl": {},  # as shipped: bfloat16 autocast, activations recomputed
    "trl-tuned": TUNED,
    "trl-compiled": {**TUNED, "use_liger_kernel": False, "torch_compile": True},
    "trl-packed": {**TUNED, "packing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("side", choices=[*OURS, *TRL, "ceilings"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--small", action="store_true")
    words = parser.parse_args()
    case = case_of(words.case, words.rows, small=words.small)
    if words.side == "ceilings":
        found = ceilings()
    else:
        found = (train_ours if words.side in OURS else train_with_trl)(case, words.side, words.steps)
    words.out.write_text(json.dumps(found))


def case_of(name: str, rows: int | None, *, small: bool) -> Case:
    case = CASES[name] if rows is None else replace(CASES[name], rows=rows)
    return replace(case, shape=TINY, length=128, rows=2, documents=4) if small else case


# What is trained on


def documents(case: Case, packed: bool, steps: int) -> list[np.ndarray]:
    """As many as the steps need; tokens by Zipf's law, so that there is something to learn."""
    numbers = np.random.default_rng(0)
    wanted = steps * (case.rows * case.length if packed else case.documents * case.length)
    lengths = np.full(wanted // case.length, case.length)
    if case.short:  # Alpaca's: a median of 85 tokens with the prompt, some of several hundred
        drawn = np.exp(numbers.normal(np.log(85), 0.7, size=max(wanted // 50, 8 * steps)))
        lengths = np.clip(drawn, 8, case.length // 2).astype(int)
    return [numbers.zipf(1.2, size=length) % case.shape["vocab_size"] for length in lengths]


def members(case: Case, side: str, steps: int) -> list[list[np.ndarray]]:
    """The rows of all steps, each the documents that share it."""
    from runner.data import packing

    packed = is_packed(case, side)
    made = documents(case, packed, steps)
    if not packed:
        return [[document] for document in made[: steps * case.documents]]
    packs = packing.pack(np.array([len(document) for document in made]), case.length)
    shared = np.split(packs.rows, packs.offsets[1:-1])
    return [[made[row] for row in rows] for rows in shared[: steps * case.rows]]


def is_packed(case: Case, side: str) -> bool:
    """Whether a row holds ``length`` tokens: of full length it does, packed or not."""
    return not case.short or side not in ("trl", "trl-tuned", "trl-compiled", "ours-documents")


def rows_of(case: Case, side: str) -> int:
    return case.rows if is_packed(case, side) else case.documents


# The two sides


def made_model(case: Case, dtype: Any = None) -> Any:
    """The base model, made on the device, with the same random weights in every process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    device, usual = where()
    dtype = dtype or usual
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**case.shape), dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if case.quant == "4bit":
        quantize(model, device, dtype)
    return model


def quantize(model: Any, device: Any, dtype: Any) -> None:
    """The linear layers of the decoder in nf4 with double quantization, as from_pretrained of transformers does it."""
    import bitsandbytes as bnb
    import torch

    for module in [module for module in model.get_decoder().modules() if not isinstance(module, torch.nn.Linear)]:
        for name, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear):
                sizes = linear.in_features, linear.out_features
                options = {"compress_statistics": True, "quant_type": "nf4"}
                made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, device="meta", **options)
                weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)
                made.weight = weight.to(device)
                setattr(module, name, made)


def where() -> tuple[Any, Any]:
    import torch

    on_gpu = torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32


def train_ours(case: Case, side: str, steps: int) -> dict[str, Any]:
    """The steps of runner's loop, with all that a run has around them but evaluation, checkpoints and tracking."""
    import torch

    from runner.models import pretrained
    from runner.models.dtypes import dtype_for
    from runner.models.kernels import compilation
    from runner.tracking.rundir import RunDir
    from runner.train import build, loop, throughput
    from runner.train.checkpoint import Progress
    from runner.train.parts import Hooks

    def load(source: Any, quant: Any, device: Any) -> Any:
        return adopted(made_model(case, dtype_for(source.dtype, device)), source, quant)

    pretrained.load = load  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        cfg = composed(case, side, steps, Path(name))
        made = inputs(cfg, case, side, steps)
        parts = build.parts(made, RunDir(Path(name) / "run"))
        losses: list[float] = []
        hooks = Hooks(
            record=lambda _, metrics: losses.append(metrics["train/loss"]),
            evaluating=lambda *_: None,
            saving=lambda *_: None,
            check_stop=lambda: None,
            warm=lambda: None,
        )
        progress, times, graphs = Progress(), Clock(steps), 0
        for step in range(steps):
            loop.optimizer_step(parts, progress, hooks)
            times.step_is_done()
            graphs = compilation.graphs() if step == 0 else graphs
        loop.catch_up(parts, progress, hooks)
    tokens = [sum(batch["tokens"] for batch in parts.batches.step(step)) for step in range(steps)]
    spans = np.array([len(document) for row in members(case, side, steps) for document in row])
    return {
        **times.result(),
        "losses": losses,
        "tokens": tokens,
        "flops_per_token": throughput.flops_per_token(parts.model, int((spans**2).sum() / spans.sum())),
        "attention": parts.model.config._attn_implementation,
        "graph_breaks": compilation.graph_breaks() if compilation.is_compiled(parts.model) else [],
        "graphs_after_first_step": compilation.graphs() - graphs,
        "torch": torch.__version__,
    }


def composed(case: Case, side: str, steps: int, folder: Path) -> dict[str, Any]:
    """runner's configuration, its model that of a folder which holds a configuration and no weights."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from transformers import LlamaConfig

    from runner.config import bind

    LlamaConfig(**case.shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    adapter = ["lora=none"] if case.lora is None else [f"lora.r={case.lora}", f"lora.lora_alpha={2 * case.lora}"]
    overrides = [
        "model=local", f"model.path={folder}", f"model.dtype={str(where()[1]).removeprefix('torch.')}",
        f"quant={case.quant}", *adapter, "task=pretrain", "data=local", "data.path=none", "tracking=offline",
        f"data.max_length={case.length}", f"optim.learning_rate={LEARNING_RATE}", "optim.weight_decay=0",
        "schedule=constant", "schedule.warmup_ratio=0", "parallel=none", f"train.max_steps={steps}",
        f"train.per_device_batch_size={rows_of(case, side)}", *OURS[side],
    ]  # fmt: skip
    with initialize_config_dir(str(bind.config_dir()), version_base=None):
        found = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def inputs(cfg: dict[str, Any], case: Case, side: str, steps: int) -> Any:
    """What ``build.inputs`` makes, of documents that are tokens already."""
    from runner.data import packing
    from runner.data.batches import Batches
    from runner.models.kernels import compilation
    from runner.models.sources import ModelSource
    from runner.train import answers, devices
    from runner.train.inputs import Inputs
    from runner.train.options import Options

    options = Options(cfg)
    rows = members(case, side, steps)
    ids = np.concatenate([document for row in rows for document in row]).astype(np.int32)
    offsets = np.cumsum([0, *(len(document) for row in rows for document in row)])
    packs = packing.Packs(np.arange(len(offsets) - 1), np.cumsum([0, *map(len, rows)]))
    batches = Batches(
        packing.Rows(ids, ids, offsets, packs),
        packing=options.data.packing,
        max_length=case.length,
        rows_per_batch=rows_of(case, side),
        accumulation=1,
        seed=0,
        shuffle=False,
        pad_id=0,
    )
    report = SimpleNamespace(train_tokens=len(ids), train_trained_tokens=len(ids) - len(offsets) + 1)
    model = cfg["model"]
    source = ModelSource(model["path"], None, model["dtype"], model["attention"], False, "random weights")
    splits: Any = SimpleNamespace(report=report)
    settings, device, notes = options.train, devices.pick(), list[tuple[str, str]]()
    devices.choose_allocator(device, graphs=compilation.records_graphs(options.compile))
    questions = answers.questions(settings, (), batches, None)
    return Inputs(options, source, None, settings, splits, batches, batches, steps, device, notes, questions)


def adopted(model: Any, source: Any, quant: Any) -> Any:
    """What ``models.load`` does to a model that it has read."""
    from runner.models import pretrained

    quant.after_load(model)
    return pretrained._annotate(model, source, quant, "")


def train_with_trl(case: Case, side: str, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device, _ = where()
    options = dict(TRL[side])
    if device.type == "cpu":
        options |= {"use_liger_kernel": False, "bf16": False, "use_cpu": True}
    rows, packed = members(case, side, steps), options.get("packing", False)
    times = Clock(steps)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.step_is_done()

    with tempfile.TemporaryDirectory() as name:
        args = SFTConfig(
            output_dir=name,
            max_steps=steps,
            per_device_train_batch_size=rows_of(case, side),
            max_length=case.length,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            **options,
        )
        trainer = SFTTrainer(
            adapted(case, side),
            args,
            train_dataset=Dataset.from_list([trl_row(row, packed) for row in rows]),
            processing_class=byte_tokenizer(),
            callbacks=[Watch()],
        )
        trainer.train()
    each, count = rows_of(case, side), [sum(map(len, row)) for row in rows]
    return {
        **times.result(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens": [sum(count[step * each : (step + 1) * each]) for step in range(steps)],
        "torch": torch.__version__,
    }


def adapted(case: Case, side: str) -> Any:
    """The model as PEFT adapts it. In bfloat16 where TRL makes the adapter so (4 bits) or who knows it would."""
    import torch

    model = made_model(case)
    if case.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=case.lora, lora_alpha=2 * case.lora, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    found = get_peft_model(model, config)
    if case.quant == "4bit" or side != "trl":
        for parameter in found.parameters():
            parameter.data = parameter.data.to(where()[1]) if parameter.requires_grad else parameter.data
    return found


def trl_row(row: list[np.ndarray], packed: bool) -> dict[str, Any]:
    """Labels as transformers wants them, which shifts them itself; the first token of a document is not predicted."""
    ids = np.concatenate(row)
    labels = ids.copy()
    labels[np.cumsum([0, *map(len, row[:-1])])] = -100
    found = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    return {**found, "seq_lengths": [len(document) for document in row]} if packed else found


def byte_tokenizer() -> Any:
    """TRL wants one, to pad with."""
    from runner.models import tiny

    return tiny.byte_tokenizer()


class Clock:
    """When each step was done; the device is waited for only where time is taken."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, []  # type: int, list[float]
        self.begin()

    def begin(self) -> None:
        """From here on the peak of memory counts."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def step_is_done(self) -> None:
        import torch

        if torch.cuda.is_available() and len(self.times) + 1 in (1, WARM_UP, self.steps):
            torch.cuda.synchronize()
        self.times.append(time.time())

    def result(self) -> dict[str, Any]:
        from runner.train.memory import usage

        peaks = list(usage.metrics().values())
        return {"times": self.times, "peak_gib": peaks[0], "reserved_gib": peaks[-1]}


def ceilings() -> dict[str, Any]:
    """What the device reaches: a large matrix product of random numbers, and a copy of memory to itself."""
    import torch

    device, dtype = where()
    on_gpu = device.type == "cuda"
    size, words = (8192, 2**30) if on_gpu else (512, 2**22)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    memory = torch.randn(words, device=device), torch.empty(words, device=device)

    def seconds(do: Any) -> float:
        found = []
        for _ in range(12):
            with waited(on_gpu):
                began = time.perf_counter()
                do()
            found.append(time.perf_counter() - began)
        return statistics.median(found[2:])

    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "tflops": round(2 * size**3 / seconds(lambda: a @ b) / 1e12, 3),
        "tb_per_second": round(2 * 4 * words / seconds(lambda: memory[1].copy_(memory[0])) / 1e12, 3),
    }


@contextlib.contextmanager
def waited(on_gpu: bool) -> Iterator[None]:
    """The device has nothing to do when the block begins, and nothing any more when it has ended."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
    yield
    if on_gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
