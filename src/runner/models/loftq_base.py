"""What belongs to an adapter that began with LoftQ (``quantization.loftq``): its options, and the base that it fits.

``FILE`` beside the adapter says how the weights of its base are quantized, and how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner.config import pinned_weights
from runner.errors import ConfigError, Fault
from runner.files import write_atomic
from runner.models import model_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from runner.models.quantization.quant import Quant

INIT = "loftq"
"""The value of ``lora.init_lora_weights``."""
FILE = pinned_weights.LOFTQ
"""How Q is stored and, after several iterations, ``LAYER.before_b`` and ``LAYER.before_a`` (``quantization.loftq``)."""


@dataclass(frozen=True)
class About:
    """How Q was made: its iterations, bitsandbytes' kind, double quantization, the dtype that was quantized; of which
    layers.
    """

    iterations: int
    kind: Literal["nf4", "fp4"]
    double: bool
    dtype: str
    layers: list[str]

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def text(self) -> str:
        return f"{self.kind} weights{' with double quantization' if self.double else ''}"


def faults(init: Any, iterations: int, *, uses_dora: bool) -> Iterator[Fault]:
    """Faults of the options of ``lora``."""
    if init != INIT and iterations != 1:
        problem = f"has no effect with init_lora_weights={str(init).lower()}"
        yield Fault("loftq_iter", problem, f"set it to 1, or init_lora_weights={INIT}", iterations)
    if init == INIT and uses_dora:
        problem = "does not work with LoftQ: its magnitudes are those of the weights before"
        yield Fault("use_dora", problem, "set it to false, or init_lora_weights=true", True)


def quant_faults(init: Any, quant: Quant) -> Iterator[Fault]:
    if init == INIT and not quant.packs:
        problem = "begins with what 4-bit weights lose, and "
        problem += "no weight is quantized" if quant.plain else f"these are in {quant.name}"
        yield Fault("lora.init_lora_weights", problem, "set quant=4bit, or use another value", INIT)


def read(file: Path) -> tuple[dict[str, Tensor], About]:
    from safetensors import safe_open

    problem = model_folder.damage(file) if file.is_file() else "does not exist"
    if not problem:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("loftq", "{}"))
            if about:
                return {name: opened.get_tensor(name) for name in opened.keys()}, About(**about)  # noqa: SIM118
        problem = "was not written by the runner"
    raise ConfigError(Fault("", f"{file} {problem}: it says which base the adapter has", "restore it, or train again"))


def write(file: Path, tensors: Mapping[str, Tensor], about: About) -> None:
    from safetensors.torch import save

    write_atomic(file, save(dict(tensors), metadata={"loftq": json.dumps(vars(about))}))


def keep(model: Any, file: Path) -> None:
    """Let ``write_beside`` know the file of the adapter of ``model``."""
    model.loftq_file = file


def write_beside(model: Any, folder: Path) -> None:
    """Write what tells the base beside the adapter in ``folder``, if it began with LoftQ; not what it began with."""
    if file := getattr(model, "loftq_file", None):
        tensors, about = read(file)
        write(folder / FILE, {name: each for name, each in tensors.items() if ".before_" in name}, about)


def library_options(folder: Path) -> dict[str, Any]:
    """The arguments of ``BitsAndBytesConfig`` for the base of the adapter in ``folder``; empty if it is unquantized."""
    if not (folder / FILE).is_file():
        return {}
    about = read(folder / FILE)[1]
    double = {"bnb_4bit_use_double_quant": True} if about.double else {}
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": about.kind, **double, "bnb_4bit_compute_dtype": about.dtype,
    }  # fmt: skip


def library_code(folder: Path) -> str:
    """The same as Python; empty if the base is unquantized."""
    options = ", ".join(f"{name}={value!r}" for name, value in library_options(folder).items())
    return f"BitsAndBytesConfig({options})" if options else ""


def iterations_of(folder: Path) -> int:
    """The iterations of LoftQ that the adapter in ``folder`` began with; 0: it did not."""
    return read(folder / FILE)[1].iterations if (folder / FILE).is_file() else 0


def start_faults(model: Any, folder: Path) -> Iterator[Fault]:
    """Why the adapter in ``folder`` cannot be trained further on the base of ``model``."""
    if not (folder / FILE).is_file():
        return
    about = read(folder / FILE)[1]
    if about.iterations > 1:
        problem = f"that adapter began with {about.iterations} iterations of LoftQ, which quantized its base anew"
        yield Fault("lora.start", problem, "merge it (export --merged), and set model.path to that folder")
        return
    quant: Any = getattr(model, "quant", None)
    if quant is None or not quant.packs or kind(quant) != (about.kind, about.double):
        yield _other(quant, about)


def refuse_other(quant: Quant, about: About) -> None:
    if not quant.packs or kind(quant) != (about.kind, about.double):
        raise ConfigError(_other(quant, about))


def _other(quant: Quant | None, about: About) -> Fault:
    stored = quant.name if quant is not None and not quant.plain else "unquantized weights"
    problem = f"the adapter corrects the error of {about.text}, and here are {stored}"
    option = {"nf4": "4bit"}.get(about.kind, about.kind)
    return Fault("quant", problem, f"use quant={option} quant.double={str(about.double).lower()}")


def kind(quant: Any) -> tuple[Literal["nf4", "fp4"], bool]:
    return quant.kind, quant.double
