"""Options of ``optim``: optimizers and parameter groups.

Every option takes parameter groups and returns a ``torch.optim.Optimizer``. All its ``param_groups`` use
``learning_rate``, unless a group has another one (``loraplus.split``, ``with_faster_head``); its ``state_dict``
restores it bit-identically (torch.save, torch.load with weights_only).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Lt

from runner.config.bind import bind_target
from runner.config.schema import Betas, Fraction, NotNegative, Positive, Ratio
from runner.errors import ConfigError, Fault, first_line
from runner.models import new_tokens
from runner.models.kernels import compat, score_head
from runner.train.bitsandbytes_steps import repaired

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]
SMALLEST_SCALE = 1e-3
"""The root mean square of a parameter that Adafactor assumes at least, as in the paper."""


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Group the trainable parameters, in the model's order: matrices, embeddings, vectors; empty groups are left out.

    Weight decay applies to matrices and embeddings (including the LM head), not to biases, norms and other vectors, as
    in transformers' Trainer. Each group has a ``kind``, so that an optimizer can treat matrices differently.

    Raises:
        ConfigError: nothing is trainable.
    """
    embeddings = {id(parameter) for parameter in _embedding_parameters(model)}
    kinds: dict[str, list[Tensor]] = {"matrix": [], "embedding": [], "vector": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "embedding" if id(parameter) in embeddings or new_tokens.is_row(name) else "matrix"
            kinds[kind if parameter.ndim >= 2 else "vector"].append(parameter)
    if not any(kinds.values()):
        raise ConfigError(
            Fault("lora", "the model has no trainable parameter", "use lora=lora, or lora=none for full fine-tuning")
        )
    decay = {"matrix": weight_decay, "embedding": weight_decay, "vector": 0.0}
    return [{"params": params, "weight_decay": decay[kind], "kind": kind} for kind, params in kinds.items() if params]


def with_faster_head(groups: Groups, model: nn.Module, learning_rate: float, ratio: float) -> Groups:
    """The groups with those of the score head apart, which have ``ratio`` times the learning rate they would have.

    A new head begins with random weights, the others do not: small steps are right for these, and too small for it.
    """
    head = {id(parameter) for module in score_head.modules(model) for parameter in module.parameters()}
    parts: Groups = []
    for group in groups:
        own = [parameter for parameter in group["params"] if id(parameter) in head]
        rest = [parameter for parameter in group["params"] if id(parameter) not in head]
        rate = group.get("lr", learning_rate)
        parts += [{**group, "params": each, "lr": rate * n} for each, n in ((rest, 1.0), (own, ratio)) if each]
    return parts


def adamw(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    betas: Betas,
    eps: Positive,
    fused: Literal["auto"] | bool,
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """AdamW of torch (https://arxiv.org/abs/1711.05101).

    ``fused=auto`` uses the fused kernel on CUDA and CPU, and the plain one elsewhere. The fused kernel takes a third of
    the time of the plain one, also on a CPU, and is deterministic.
    """
    import torch

    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    use_fused = devices <= {"cuda", "cpu"} if fused == "auto" else fused
    try:
        return torch.optim.AdamW(
            groups, lr=learning_rate, weight_decay=weight_decay, betas=_pair(betas), eps=eps, fused=use_fused
        )
    except RuntimeError as error:
        raise ConfigError(Fault("optim.fused", first_line(error), "set optim.fused=auto", fused)) from error


def adamw_bnb(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    betas: Betas,
    eps: Positive,
    bits: Literal[8, 32],
    paged: bool,
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """AdamW of bitsandbytes, with 8-bit state in blocks of 256 values (https://arxiv.org/abs/2110.02861).

    Parameters with fewer than 4096 values keep a 32-bit state. ``paged`` moves the state to CPU memory when GPU memory
    runs out. Also works on the CPU, several times slower than ``adamw``.

    Raises:
        ConfigError: ``paged`` on a CPU (bitsandbytes 0.50 would ignore it with a warning), or an older bitsandbytes.
    """
    from bitsandbytes.optim import AdamW

    if paged and any(parameter.device.type != "cuda" for group in groups for parameter in group["params"]):
        raise ConfigError(
            Fault("optim.paged", "needs a CUDA GPU, but the model is not on one", "use optim=adamw_8bit", True)
        )
    compat.check_optimizer(groups)
    settings = {"weight_decay": weight_decay, "betas": _pair(betas), "eps": eps, "optim_bits": bits}
    return repaired(AdamW(groups, lr=learning_rate, is_paged=paged, **settings))


def lion(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    betas: Betas,
    bits: Literal[8, 32],
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """Lion of bitsandbytes: updates by the sign of a momentum, with half of Adam's state.

    https://arxiv.org/abs/2302.06675

    Raises:
        ConfigError: on a CPU with a bitsandbytes before 0.50.
    """
    from bitsandbytes.optim import Lion

    compat.check_optimizer(groups)
    return repaired(Lion(groups, lr=learning_rate, weight_decay=weight_decay, betas=_pair(betas), optim_bits=bits))


def adafactor(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    beta1: Fraction | None,
    decay_rate: Annotated[float, Ge(-1), Lt(0)],
    eps: Positive,
    clip_threshold: Positive,
    scale_parameter: bool,
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """Adafactor of transformers (https://arxiv.org/abs/1804.04235), with the learning rate of the schedule.

    Of the squared gradients of a matrix, only the means of rows and columns are stored.
    """
    from transformers.optimization import Adafactor

    settings = {"weight_decay": weight_decay, "beta1": beta1, "decay_rate": decay_rate, "eps": (eps, SMALLEST_SCALE)}
    return Adafactor(
        groups,
        lr=learning_rate,
        clip_threshold=clip_threshold,
        scale_parameter=scale_parameter,
        relative_step=False,
        **settings,
    )


def muon(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    momentum: Fraction,
    nesterov: bool,
    ns_steps: Annotated[int, Ge(1), Lt(100)],
    betas: Betas,
    eps: Positive,
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """Muon (https://kellerjordan.github.io/posts/muon) for matrices, AdamW for embeddings and vectors.

    Muon's updates are scaled to the size of AdamW's (https://arxiv.org/abs/2502.16982), so that both use the same
    ``learning_rate``. ``betas`` and ``eps`` are for AdamW.

    Raises:
        ConfigError: torch is older than 2.9, no matrix is trainable, or a parameter has more than two dimensions.
    """
    import torch

    matrices = [group for group in groups if group["kind"] == "matrix"]
    others = [group for group in groups if group["kind"] != "matrix"]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(Fault("optim", f"torch {torch.__version__} has no Muon", "install torch >= 2.9"))
    if not matrices:
        raise ConfigError(Fault("optim", "Muon needs matrices, but none is trainable", "use optim=adamw"))
    dimensions = max(parameter.ndim for group in matrices for parameter in group["params"])
    if dimensions > 2:
        problem = f"Muon needs matrices, but trained weights (experts, convolutions) have {dimensions} dimensions"
        raise ConfigError(Fault("optim", problem, "use optim=adamw, or lora=lora"))
    parts: list[Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )
    ]
    if others:
        rest = adamw(others, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps, fused="auto")
        parts.append(rest)
    return _joined(parts)


def shardable(node: Mapping[str, Any]) -> bool:
    """Whether a shard is trained as the whole parameter would be: the optimizer is elementwise."""
    return bind_target(node) is adamw


def missing_package(package: str, module: str = "") -> Iterator[Fault]:
    """A fault if a package (with another import name: ``module``) is not installed."""
    if importlib.util.find_spec(module or package) is None:
        problem = f"this optimizer needs {package}, which is not installed"
        yield Fault("", problem, f"uv pip install {package}, or use optim=adamw")


def check_adamw_bnb(**_: object) -> Iterator[Fault]:
    yield from missing_package("bitsandbytes")


check_lion = check_adamw_bnb


def check_muon(*, nesterov: bool, momentum: float, **_: object) -> Iterator[Fault]:
    if nesterov and momentum == 0:
        yield Fault("nesterov", "has no effect without momentum", "set optim.nesterov=false or raise optim.momentum")


def _joined(parts: list[Optimizer]) -> Optimizer:
    """Combine several optimizers into one with one state_dict; the parts share its groups and state."""
    from torch.optim import Optimizer

    class Joined(Optimizer):  # accelerate and torch's checkpointing require a subclass of Optimizer
        def __init__(self) -> None:
            super().__init__([group for part in parts for group in part.param_groups], {})
            self._share()

        def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
            for part in parts:
                part.step()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict)
            self._share()

        def _share(self) -> None:
            start = 0
            for part in parts:
                end = start + len(part.param_groups)
                part.param_groups, part.state = self.param_groups[start:end], self.state
                start = end

    return Joined()


def _embedding_parameters(model: nn.Module) -> Iterator[Tensor]:
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            yield from module.parameters()
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    for part in (head, *score_head.modules(model)):
        if part is not None:
            yield from part.parameters()


def _pair(betas: list[float]) -> tuple[float, float]:
    return float(betas[0]), float(betas[1])  # torch refuses 0 beside 0.99
