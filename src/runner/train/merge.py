"""Adapter and base made one, in full precision, and held against both on rows of the run.

Merging into 4-bit weights would round the sum again (peft#2321): the base is loaded as it was published, in float32.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runner.errors import ConfigError, Fault, RunnerError, TrainingError
from runner.train import trained
from runner.train.trained import Trained

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Largest difference of a logit: in float32, or in float64 where float32 rounds more than that by itself."""
RELATIVE = 1e-5
"""Largest difference as a part of the largest logit, in float32, where memory does not hold the model in float64: there
rounding alone comes to 3e-6 of it and more (SmolLM2-135M: 8e-5 at logits of 31, of which 2e-5 are left in float64)."""
COPIES = 2.5
"""What must be free for a check, in sizes of the model in float32: two of those, or one in float64, and some."""
ROWS, LONGEST = 4, 256
STOCK = "The quick brown fox jumps over the lazy dog; 12 of them did, said Ana, and nobody knew why."


@dataclass(frozen=True)
class Difference:
    """How far the merged model is from base and adapter, before it is rounded to the number format that is stored."""

    largest: float = 0.0
    """Of all logits."""
    allowed: float = TOLERANCE
    computed_in: str = "float32"


@dataclass(frozen=True)
class Check:
    """How far the model that was written is from the run's own: base and adapter, unmerged."""

    merging: Difference
    rounded: float
    """The largest difference of the written model, rounded to ``dtype``."""
    dtype: str
    rows: str

    def notes(self) -> dict[str, str]:
        """Facts for the terminal and the card."""
        found = self.merging
        said = f"logits differ by {found.largest:.1e} at most from base + adapter in full precision (allowed: "
        said += f"{found.allowed:.3g}; computed in {found.computed_in}, on {self.rows})"
        once = "" if self.dtype == "float32" else f", by {self.rounded:.1e} once rounded to {self.dtype}"
        return {"check": said + once, "dtype": self.dtype}


def write(run: Trained, folder: Path, dtype: str | None) -> Check:
    """Write the whole model, with its tokenizer, into ``folder``, and check what plain transformers reads there.

    No logit may differ by more than 1e-4 from base and adapter. Logits of 40 are rounded by more than that in float32,
    whatever the order of the sums: then all is computed again in float64, or, where memory does not hold it, 1e-5 of
    the largest logit is allowed.

    Raises:
        TrainingError: it says something else than base and adapter; what was written is of no use then.
        ConfigError: an adapter that cannot be merged.
    """
    from runner.data import chat_template
    from runner.models import pretrained
    from runner.train import generate

    device = _device(run)
    rows, where = _rows(run)
    model = _unmerged(run, device)
    expected = _logits(model, rows)
    merging = Difference()
    if run.is_adapter:
        model = _merged(model)
        merging = _difference(run, model, rows, expected)
    _refuse_other(merging.largest, merging.allowed, "merging")
    merged = _logits(model, rows)
    stored = dtype or _stored(run)
    model.to(dtype=_torch_dtype(stored))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = (
            generate.end_tokens(model, chat_template.end_of_turn(run.tokenizer)) or None
        )
    pretrained.save_whole(model, folder, model.state_dict())
    run.tokenizer.save_pretrained(folder)
    del model
    read = _logits(_read(folder, device), rows)
    _refuse_other(_worst(merged, read), TOLERANCE if stored == "float32" else float("inf"), "writing")
    return Check(merging, _worst(expected, read), stored, where)


def _unmerged(run: Trained, device: torch.device) -> Any:
    from runner.models import quantization

    return trained.load(run, device, dtype="float32", quant=quantization.none(), unties=True)


def _merged(model: Any) -> Any:
    """The base with the adapter in it; each sum is taken in float64, layer by layer, and rounded once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.double()
                module.merge(safe_merge=True)
                module.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that all is merged already
            return model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        method = next(iter(model.peft_config.values())).peft_type
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        problem = f"PEFT cannot merge {getattr(method, 'value', method)}: {text}"
        raise ConfigError(Fault("--merged", problem, "export the adapter as it is: leave --merged out")) from error


def _difference(run: Trained, model: Any, rows: list[list[int]], expected: list[Any]) -> Difference:
    """How far ``model``, merged, is from ``expected``: the logits of base and adapter, in float32."""
    in_float32 = _worst(expected, _logits(model, rows))
    if in_float32 <= TOLERANCE:
        return Difference(in_float32)
    device = next(model.parameters()).device
    if not _fits(run, device):
        return Difference(in_float32, max(TOLERANCE, RELATIVE * max(float(row.abs().max()) for row in expected)))
    found = _logits(model.double(), rows)
    model.float()  # as it was: each of its numbers is one of float32
    return Difference(_worst(_logits(_unmerged(run, device).double(), rows), found), TOLERANCE, "float64")


def _worst(expected: list[Any], found: list[Any]) -> float:
    """The largest difference of a logit; not a number where one of them is none."""
    differences = [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")


def _refuse_other(difference: float, allowed: float, doing: str) -> None:
    if not difference <= allowed:
        problem = f"{doing} changed what the model says: a logit differs by {difference:.2e}, allowed is {allowed:g}"
        remedy = "nothing was exported; the adapter as it is (without --merged) is sound. Tell us which adapter this is"
        raise TrainingError(Fault("--merged", problem, remedy))


def _logits(model: Any, rows: list[list[int]]) -> list[Any]:
    """For each row its logits (T, V), on the CPU, in the precision that they were computed in."""
    import torch

    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        asked = (torch.tensor([row], device=device) for row in rows)
        return [model(input_ids=ids, use_cache=False).logits[0].cpu() for ids in asked]


def _read(folder: Path, device: torch.device) -> Any:
    """The model as anybody reads it: computed in float32 from the weights as they are stored."""
    from transformers import AutoModelForCausalLM

    from runner.models.dtypes import dtype_argument

    return AutoModelForCausalLM.from_pretrained(folder, **dtype_argument(_torch_dtype("float32"))).to(device)


def _rows(run: Trained) -> tuple[list[list[int]], str]:
    """A few rows of tokens, held out where the run's data is at hand, and what they are."""
    from runner.config.schema import TrainSettings
    from runner.train import inputs

    cfg = {**run.cfg, "parallel": {"_target_": "runner.train.distributed.parallel.none"}}
    try:
        loaded = inputs.load_data(cfg, run.task, run.result, run.tokenizer, TrainSettings(**cfg["train"]), 0)
        held_out = loaded[0].eval
        found = [held_out[number][0][:LONGEST].tolist() for number in range(min(ROWS, len(held_out)))]
        return found, f"{len(found)} held-out rows"
    except RunnerError:  # moved, or changed: the folder of the run keeps a few prompts
        texts = [sample["prompt"] for sample in _samples(run)][:ROWS]
    where = f"{len(texts)} prompts of the run" if texts else "a stock sentence: the run's data is not at hand"
    return [_tokens(run, text) for text in texts or [STOCK]], where


def _samples(run: Trained) -> list[dict[str, str]]:
    return list(json.loads(run.rundir.samples.read_text())) if run.rundir.samples.exists() else []


def _tokens(run: Trained, text: str) -> list[int]:
    return list(run.tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST])


def _stored(run: Trained) -> str:
    """The number format in which the base model lies on disk, or that of the fully trained weights."""
    from runner.models import pretrained

    config = pretrained.architecture(run.result)
    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32"
    return str(found).removeprefix("torch.")


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return cast("torch.dtype", getattr(torch, name))


def _device(run: Trained) -> torch.device:
    """The accelerator where two such models in float32 fit, else the CPU."""
    import torch

    from runner.train import inputs

    device = inputs.pick_device()
    return device if device.type != "cpu" and _fits(run, device) else torch.device("cpu")


def _fits(run: Trained, device: torch.device) -> bool:
    """Whether the device has room for a check."""
    from runner.models import pretrained, quantization
    from runner.train.memory import usage

    size = pretrained.describe(pretrained.empty(run.result, quantization.none()))["total"] * 4
    return COPIES * size < usage.of_device(device)[1]
