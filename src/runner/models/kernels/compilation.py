"""torch.compile, in place: a compiled module keeps its parameters' names, so checkpoints and adapters do not notice.

What is compiled has shapes that stay the same from step to step. The head is left out on purpose: it sees only the
positions that are trained, and their number is another one in each batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, Fault
from runner.files import cache_dir

if TYPE_CHECKING:
    import torch
    from torch import nn

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
PAYS_FROM_S = 300
"""Seconds of training, as ``plan`` tells them, from which on ``auto`` compiles on a GPU: the first step waits up to a
minute longer, and each one is to take a tenth to a quarter less."""


@dataclass(frozen=True)
class Choice:
    """What ``compile`` came to."""

    node: Mapping[str, Any]
    """Of the option, which is no more ``auto``."""
    settled: str = ""
    """The name of the option where ``auto`` chose it."""
    reason: str = ""
    """Why ``auto`` does not compile; empty where it does."""


def auto(model: nn.Module) -> nn.Module:
    """``regional`` on a GPU where that pays, else ``none``; settled by ``build``, which knows the device."""
    raise AssertionError("compile=auto is settled before anything is compiled")


def none(model: nn.Module) -> nn.Module:
    """Every operation by itself, as PyTorch does without asking."""
    return model


def regional(model: nn.Module, *, mode: Mode, dynamic: bool | None, fullgraph: bool) -> nn.Module:
    """Compile one decoder layer and use it for all: the first step waits seconds, not minutes.

    Raises:
        ConfigError: the device cannot, no decoder layers are found, or ``fullgraph`` with 8-bit layers.
    """
    _check(model, mode, fullgraph)
    for layer in decoder_layers(model):
        layer.compile(mode=mode, dynamic=dynamic, fullgraph=fullgraph)
    return model


def whole(model: nn.Module, *, mode: Mode, dynamic: bool | None, fullgraph: bool) -> nn.Module:
    """Compile the decoder, all layers in one graph: the longest wait, and what CUDA graphs need.

    Raises:
        ConfigError: the device cannot, or ``fullgraph`` with 8-bit layers.
    """
    _check(model, mode, fullgraph)
    _decoder(model).compile(mode=mode, dynamic=dynamic, fullgraph=fullgraph)
    return model


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """While the block runs, what is compiled computes as it is written.

    For generation: its shapes change with every token, and its cache is another object in each layer. The graphs of one
    answer would use up Dynamo's limit for a function, and training would not be compiled any more, without a word.
    """
    import torch

    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # torch < 2.6
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """For an import: what it decorates with torch.compile is compiled when it is first called.

    The decorator loads Inductor at once, 1.5 s and more: bitsandbytes 0.50 does so at its top, and PEFT imports it.
    """
    import torch

    compile_now: Any = torch.compile

    def later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that make up the decoder, to be compiled.

    Raises:
        ConfigError: there is no list of equal ones.
    """
    if not (layers := layers_of(model)):
        problem = f"{type(model).__name__} has no list of equal layers"
        raise ConfigError(Fault("compile", problem, "use compile=default or compile=none"))
    return layers


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The largest list of modules of one class in the decoder; empty where there is none."""
    from torch import nn

    lists: list[nn.ModuleList] = [
        module
        for module in _decoder(model).modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    return list(max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()), default=[]))


def is_asked_for(node: Mapping[str, Any]) -> bool:
    """Of the YAML of an option."""
    return node["_target_"] != f"{none.__module__}.{none.__name__}"


def obstacle(device: torch.device, layers: int, in_8_bits: bool, in_shards: bool) -> str:
    """Why ``auto`` compiles nothing, however long the training; empty where nothing stands against it.

    ``layers``: how many ``layers_of`` finds. All of it is known before a weight is loaded.
    """
    if device.type != "cuda":
        return "a CPU waits long and gains little"
    if not layers:
        return "the model has no list of equal layers"
    if in_8_bits:
        return "the 8-bit layers of bitsandbytes break graphs"
    if in_shards:
        return "the layers are in shards"
    try:
        _check_compiler(device)
    except ConfigError as error:
        return error.faults[0].problem
    return ""


def is_compiled(model: nn.Module) -> bool:
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def graph_breaks() -> list[str]:
    """Why compiled code had to go back to Python: each reason with how often it was met; empty when it never had."""
    from torch._dynamo.utils import counters

    return [f"{count} × {' '.join(reason.split())[:300]}" for reason, count in counters["graph_break"].items()]


def graphs() -> int:
    """How many graphs this process has compiled; more of them after the first steps are recompilations."""
    if "torch._dynamo" not in sys.modules:  # takes a second to load, and nothing has been compiled without it
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _check(model: nn.Module, mode: Mode, fullgraph: bool) -> None:
    device = next(model.parameters()).device
    if mode == "reduce-overhead" and device.type != "cuda":
        problem = f"reduce-overhead records CUDA graphs, and the model is on {device}: it would change nothing"
        raise ConfigError(Fault("compile.mode", problem, "use compile=regional or compile=default", mode))
    if fullgraph and any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        problem = "the 8-bit layers of bitsandbytes break the graph in evaluation"
        raise ConfigError(Fault("compile.fullgraph", problem, "set it to false, or use quant=4bit", True))
    _check_compiler(device)


def _check_compiler(device: torch.device) -> None:
    _share_what_is_compiled()
    # Inductor writes C++ for a CPU and Triton for a GPU; Triton compiles its launcher with a C compiler.
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        if importlib.util.find_spec("triton") is None:
            problem = "needs Triton to write code for the GPU"
            raise ConfigError(Fault("compile", problem, "install triton, or use compile=none"))
    if not any(map(shutil.which, names)):
        problem = f"needs a compiler on this machine, one of: {', '.join(names)}"
        raise ConfigError(Fault("compile", problem, "install one (Debian: apt install g++), or use compile=none"))


def _share_what_is_compiled() -> None:
    """What one run has compiled the next one finds, in the user's cache; unless somebody has chosen another folder.

    torch writes the folder of its own choice into the environment as soon as it is imported.
    """
    chosen = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if chosen == Path() or (chosen.parent == Path(tempfile.gettempdir()) and chosen.name.startswith("torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir("compiled"))


def _decoder(model: Any) -> nn.Module:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: nn.Module = base.get_decoder() if hasattr(base, "get_decoder") else base
    return decoder
