"""Merge an adapter into its base model in full precision, and compare the logits with the unmerged model.

The base is loaded unquantized in float32, because merging into 4-bit weights rounds the sum again (peft#2321).
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from runner.errors import ConfigError, Fault, RunnerError, TrainingError, first_line
from runner.train import run_summary, trained_model
from runner.train.trained_model import Trained

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Maximum allowed logit difference: in float32, or in float64 if float32 rounding alone exceeds it."""
RELATIVE = 1e-5
"""Maximum allowed difference relative to the largest logit, in float32, if memory is too small for float64. Rounding
alone gives 3e-6 and more (SmolLM2-135M: 8e-5 at logits of 31; 2e-5 in float64)."""
COPIES = 2.5
"""Free memory needed for the check, in float32 model sizes: two float32 models or one float64 model, plus reserve."""
ROWS, LONGEST = 4, 256
"""Rows of a check, and their maximum number of tokens."""
FALLBACK_TEXT = "The quick brown fox jumps over the lazy dog; 12 of them did, said Ana, and nobody knew why."


@dataclass(frozen=True)
class Difference:
    """Logit difference between merged and unmerged model, before rounding to the stored dtype."""

    largest: float = 0.0
    """Maximum over all logits."""
    allowed: float = TOLERANCE
    computed_in: str = "float32"


@dataclass(frozen=True)
class Check:
    """Comparison of the written model with the unmerged model (base + adapter)."""

    merging: Difference
    rounded: float
    """Maximum logit difference of the written model, rounded to ``dtype``."""
    dtype: str
    rows: str

    def notes(self) -> dict[str, str]:
        """Results for the terminal and the model card."""
        difference = self.merging
        text = f"logits differ by {difference.largest:.1e} at most from base + adapter in full precision (allowed: "
        text += f"{difference.allowed:.3g}; computed in {difference.computed_in}, on {self.rows})"
        if self.dtype != "float32":
            text += f", by {self.rounded:.1e} after rounding to {self.dtype}"
        return {"check": text, "dtype": self.dtype}


def write(run: Trained, folder: Path, dtype: str | None) -> Check:
    """Write the merged model and its tokenizer to ``folder``, load it with transformers and compare its logits.

    No logit may differ by more than 1e-4 from base + adapter. Large logits (40) are rounded by more than that in
    float32; then the comparison is repeated in float64 or, with little memory, 1e-5 of the largest logit is allowed.

    Raises:
        TrainingError: the difference is too large; do not use the written files.
        ConfigError: PEFT cannot merge the adapter.
    """
    from runner.data import chat_template
    from runner.models import pretrained, tokenizer_files
    from runner.tasks import sampling

    device = _device(run)
    rows, where = _rows(run)
    model = _unmerged(run, device)
    expected = _logits(model, rows)
    merging = Difference()
    if run.is_adapter:
        model = _merged(model)
        merging = _difference(run, model, rows, expected)
    _check_difference(merging.largest, merging.allowed, "merging")
    merged = _logits(model, rows)
    stored = dtype or _stored(run)
    model.to(dtype=_torch_dtype(stored))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = (
            sampling.end_tokens(model, chat_template.end_of_turn(run.tokenizer)) or None
        )
    pretrained.save_whole(model, folder, model.state_dict())
    tokenizer_files.save(run.tokenizer, folder)
    del model
    read = _logits(_read(run, folder, device), rows)
    _check_difference(_worst(merged, read), TOLERANCE if stored == "float32" else float("inf"), "writing")
    return Check(merging, _worst(expected, read), stored, where)


def _unmerged(run: Trained, device: torch.device) -> Any:
    from runner.models.quantization import none

    return trained_model.load(run, device, dtype="float32", quant=none.none(), unties=True)


def _merged(model: Any) -> Any:
    """Merge the adapter into the base, layer by layer in float64, rounded once to float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.double()
                module.merge(safe_merge=True)
                module.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warns that all layers are merged already
            return model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        method = next(iter(model.peft_config.values())).peft_type
        problem = f"PEFT cannot merge {getattr(method, 'value', method)}: {first_line(error)}"
        raise ConfigError(Fault("--merged", problem, "export the adapter unmerged: remove --merged")) from error


def _difference(run: Trained, model: Any, rows: list[dict[str, Any]], expected: list[Any]) -> Difference:
    """Difference of the merged ``model`` from ``expected``, the float32 logits of base + adapter."""
    in_float32 = _worst(expected, _logits(model, rows))
    if in_float32 <= TOLERANCE:
        return Difference(in_float32)
    device = next(model.parameters()).device
    if not _fits(run, device):
        return Difference(in_float32, max(TOLERANCE, RELATIVE * max(float(row.abs().max()) for row in expected)))
    merged = _logits(model.double(), rows)
    model.float()  # lossless: the weights were float32 before
    unmerged = _logits(_unmerged(run, device).double(), rows)
    return Difference(_worst(unmerged, merged), TOLERANCE, "float64")


def _worst(expected: list[Any], actual: list[Any]) -> float:
    """Maximum logit difference; NaN if any logit is NaN."""
    differences = [float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True)]
    return max(differences) if all(d == d for d in differences) else float("nan")


def _check_difference(difference: float, allowed: float, doing: str) -> None:
    if not difference <= allowed:
        problem = f"{doing} changed the logits by up to {difference:.2e} (allowed: {allowed:g})"
        remedy = "nothing was exported; export the adapter without --merged, and please report this adapter as a bug"
        raise TrainingError(Fault("--merged", problem, remedy))


def _logits(model: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """Logits (T, V) of each row, on the CPU, in the dtype of the computation; rows: arguments of the model."""
    import torch

    from runner.models.kernels import base_model

    model.eval()
    device = next(model.parameters()).device
    parameters = inspect.signature(type(base_model.of(model)).forward).parameters
    is_taken = "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    options = {"use_cache": False} if is_taken else {}  # an encoder of transformers 4 has no such argument
    with torch.no_grad():
        batches = ({name: value.to(device) for name, value in row.items()} for row in rows)
        return [model(**batch, **options).logits[0].cpu() for batch in batches]


def _read(run: Trained, folder: Path, device: torch.device) -> Any:
    """Load the written model with plain transformers, in float32."""
    from runner.models import architecture, pretrained
    from runner.models.dtypes import dtype_argument
    from runner.models.kernels import score_head

    head = run.result.head
    auto_class = pretrained.auto_class(architecture.read(run.result), head)
    model = auto_class.from_pretrained(folder, **dtype_argument(_torch_dtype("float32"))).to(device)
    if head is not None:
        score_head.install(model, head)
    return model


def _rows(run: Trained) -> tuple[list[dict[str, Any]], str]:
    """(arguments of the model for a few rows, their description): held-out rows if the run's data is available.

    Rows with images have these, too, and are not cut.
    """
    from runner.data import images, vision
    from runner.train import inputs

    try:
        held_out = inputs.load_data(run.options, run.result, run.tokenizer)[0].eval
        rows, reader = [], vision.of(run.tokenizer)
        for number in range(min(ROWS, len(held_out))):
            shown = images.of_rows(held_out.images, number)
            row = _arguments(held_out[number][0][: None if shown else LONGEST].tolist())
            rows.append(row if reader is None else {**row, **reader.tensors([shown], row["input_ids"])})
        return rows, f"{len(rows)} held-out rows"
    except RunnerError:  # data moved or changed: use the prompts saved in the run folder
        texts = [sample["prompt"] for sample in _samples(run)][:ROWS]
    where = f"{len(texts)} prompts of the run" if texts else "a fixed sentence: the run's data is not available"
    return [_arguments(_tokens(run, text)) for text in texts or [FALLBACK_TEXT]], where


def _arguments(ids: list[int]) -> dict[str, Any]:
    import torch

    return {"input_ids": torch.tensor([ids])}


def _samples(run: Trained) -> list[dict[str, str]]:
    return run_summary.samples(run.rundir) or []


def _tokens(run: Trained, text: str) -> list[int]:
    return list(run.tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST])


def _stored(run: Trained) -> str:
    """The dtype of the base model's files or, after full fine-tuning, of the run's files."""

    from runner.models import architecture

    config = architecture.read(run.result)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return cast("torch.dtype", getattr(torch, name))


def _device(run: Trained) -> torch.device:
    """The GPU if it has enough free memory for the check, else the CPU."""
    import torch

    from runner.train import devices

    device = devices.pick()
    return device if device.type != "cpu" and _fits(run, device) else torch.device("cpu")


def _fits(run: Trained, device: torch.device) -> bool:
    """Whether the device has enough free memory for a check."""
    from runner.models import parameters, pretrained
    from runner.models.quantization import none
    from runner.train.memory import usage

    size = parameters.describe(pretrained.empty(run.result, none.none()))["total"] * 4
    return COPIES * size < usage.of_device(device)[1]
