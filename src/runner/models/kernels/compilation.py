"""torch.compile, the options of the group ``compile``. In place, so parameter names and checkpoints do not change.

Only the decoder is compiled: its shapes are the same in every step. The LM head is not compiled, because it computes
only the positions with a label, whose number differs between batches.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, Fault
from runner.files import cache_dir
from runner.models.kernels import base_model

if TYPE_CHECKING:
    import torch
    from torch import nn

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
PAYS_FROM_S = 300
"""Minimum estimated training time, in seconds, for which ``auto`` compiles on a GPU: the first step takes up to a
minute longer, each further step should take 10 to 25 % less."""


@dataclass(frozen=True)
class Choice:
    """The option of ``compile`` after resolving ``auto``."""

    option: functools.partial[nn.Module]
    """Compiles a model in place; never ``auto``."""
    settled: str = ""
    """The name of the option if ``auto`` chose it."""
    reason: str = ""
    """Why ``auto`` does not compile; empty if it does."""

    @property
    def is_eager(self) -> bool:
        return self.option.func is none


def auto(model: nn.Module) -> nn.Module:
    """``regional`` on a GPU if the training is long enough, else ``none``; resolved by ``train.build``."""
    raise AssertionError("compile=auto must be resolved before compiling")


def none(model: nn.Module) -> nn.Module:
    """Eager execution: do not compile."""
    return model


def regional(model: nn.Module, *, mode: Mode, dynamic: bool | None, fullgraph: bool) -> nn.Module:
    """Compile one decoder layer and reuse its graph for all layers: compiling takes seconds, not minutes.

    Raises:
        ConfigError: the device is not supported, no decoder layers are found, or quantized layers break graphs.
    """
    import torch._dynamo

    _check(model, mode, fullgraph)
    torch._dynamo.config.optimize_ddp = False  # it cuts a layer where DDP's buckets end; layers overlap without that
    for layer in decoder_layers(model):
        layer.compile(mode=mode, dynamic=dynamic, fullgraph=fullgraph)
    return model


def whole(model: nn.Module, *, mode: Mode, dynamic: bool | None, fullgraph: bool) -> nn.Module:
    """Compile the whole decoder as one graph: takes longest to compile; needed for CUDA graphs.

    Raises:
        ConfigError: the device is not supported, or quantized layers break graphs.
    """
    _check(model, mode, fullgraph)
    _decoder(model).compile(mode=mode, dynamic=dynamic, fullgraph=fullgraph)
    return model


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Run compiled modules in eager mode inside the block.

    For generation: its shapes change with every token, and every layer has another cache object. One answer would
    reach Dynamo's recompile limit, after which training would silently run in eager mode too.
    """
    import torch

    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # torch < 2.6
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """For imports inside the block: delay each ``@torch.compile`` to the first call of the decorated function.

    The decorator imports Inductor immediately (1.5 s or more). bitsandbytes 0.50 uses it at module level, and PEFT
    imports bitsandbytes.
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
    """Like ``layers_of``, but an error if there are none."""
    if not (layers := layers_of(model)):
        problem = f"{type(model).__name__} has no list of decoder layers of one class"
        raise ConfigError(Fault("compile", problem, "use compile=default or compile=none"))
    return layers


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the largest ModuleList whose modules have one class; empty if there is none."""
    from torch import nn

    lists: list[nn.ModuleList] = [
        module
        for module in _decoder(model).modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    return list(max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()), default=[]))


def obstacle(device: torch.device, layers: int, graph_breaks: str, in_shards: bool) -> str:
    """The reason why ``auto`` never compiles this model, or "". Needs no weights.

    ``layers``: the number of decoder layers found by ``layers_of``. ``graph_breaks``: see ``Quant``.
    """
    if device.type != "cuda":
        return "on a CPU, compiling takes long and gains little"
    if not layers:
        return "the model has no list of decoder layers of one class"
    if graph_breaks:
        return graph_breaks
    if in_shards:
        return "the layers are sharded"
    try:
        _check_compiler(device)
    except ConfigError as error:
        return error.faults[0].problem
    return ""


def records_graphs(option: functools.partial[nn.Module]) -> bool:
    """Whether this option of ``compile`` records CUDA graphs on a GPU."""
    return option.keywords.get("mode") in ("reduce-overhead", "max-autotune")


def is_compiled(model: nn.Module) -> bool:
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


def forget_shapes(model: nn.Module) -> None:
    """Drop what is compiled: for a second shape Dynamo compiles for any shape, which is slower, and keeps that."""
    if is_compiled(model):
        import torch._dynamo

        torch._dynamo.reset()


def graph_breaks() -> list[str]:
    """The reasons of graph breaks, each with its count; empty if there were none."""
    from torch._dynamo.utils import counters

    return [f"{count} × {' '.join(reason.split())[:300]}" for reason, count in counters["graph_break"].items()]


def graphs() -> int:
    """Number of graphs compiled by this process; an increase after the first steps means recompilation."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet; the import would take a second
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _check(model: nn.Module, mode: Mode, fullgraph: bool) -> None:
    device = next(model.parameters()).device
    if mode == "reduce-overhead" and device.type != "cuda":
        problem = f"has no effect: reduce-overhead records CUDA graphs, but the model is on {device}"
        raise ConfigError(Fault("compile.mode", problem, "use compile=regional or compile=default", mode))
    quant: Any = getattr(model, "quant", None)
    if fullgraph and quant is not None and quant.graph_breaks:
        remedy = "set it to false, or use another quantization"
        raise ConfigError(Fault("compile.fullgraph", quant.graph_breaks, remedy, True))
    _check_compiler(device)


def _check_compiler(device: torch.device) -> None:
    from torch._dynamo import config

    _set_cache_folder()
    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        problem = "has no effect: TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE switches compilation off"
        raise ConfigError(Fault("compile", problem, "unset the environment variable, or use compile=none"))
    # Inductor generates C++ for a CPU and Triton for a GPU; Triton compiles its launcher with a C compiler.
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        if importlib.util.find_spec("triton") is None:
            problem = "needs Triton to generate GPU code, which is not installed"
            raise ConfigError(Fault("compile", problem, "install triton, or use compile=none"))
    if not any(map(shutil.which, names)):
        problem = f"needs a C/C++ compiler on the PATH, one of: {', '.join(names)}"
        raise ConfigError(Fault("compile", problem, "install one (Debian: apt install g++), or use compile=none"))


def _set_cache_folder() -> None:
    """Let Inductor cache compiled code in the user's cache folder, shared by all runs, unless the user set a folder.

    torch sets the variable to a temporary folder when it is imported; that value does not count as set by the user.
    """
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if folder == Path() or (folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir("compiled"))


def _decoder(model: Any) -> nn.Module:
    base = base_model.of(model)
    decoder: nn.Module = base.get_decoder() if hasattr(base, "get_decoder") else base
    return decoder
