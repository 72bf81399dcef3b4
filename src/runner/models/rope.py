"""RoPE scaling (``model.rope_scaling``): rotary frequencies for longer texts than those of pretraining.

The scaling has to be in the configuration before the model is created, and it has to keep the base frequency
(``rope_theta``): a later change of the configuration has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from annotated_types import Gt

from runner.config.bind import unknown_key
from runner.config.bounds import allowed, fits
from runner.config.schema import COMPUTABLE, Count, NotNegative, Text
from runner.errors import ConfigError, Fault
from runner.models.kernels import compat

KEY, POSITIONS = "rope_scaling", "max_position_embeddings"
ORIGINAL = "original_max_position_embeddings"
Scaling = dict[str, Text | bool | Annotated[float, COMPUTABLE]]
Above1 = Annotated[float, Gt(1), COMPUTABLE]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {},  # https://arxiv.org/abs/2306.15595
    "yarn": dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), NotNegative),
    "llama3": dict.fromkeys(("low_freq_factor", "high_freq_factor"), NotNegative),  # https://arxiv.org/abs/2407.21783
}
"""Kind of scaling → its keys beside ``COMMON``; those of llama3 are required. yarn: https://arxiv.org/abs/2309.00071."""
COMMON = {"rope_type": Text, "factor": Above1, ORIGINAL: Count}
REPLACEABLE = (*KINDS, "default", "dynamic")
DYNAMIC = (
    "chooses the frequencies by the longest document of a batch: up to the length of the model it changes nothing, and "
    "beyond it a document would be computed differently beside others"
)


def faults(scaling: Mapping[str, Any] | None, positions: int | None) -> Iterator[Fault]:
    """Values that are wrong for every model."""
    if scaling is None:
        return
    if not compat.at_least("transformers", "5"):
        yield Fault(KEY, "needs transformers 5", "install transformers >= 5, or set it to null")
    if positions is not None:
        problem = f"is computed from {KEY}.factor"
        yield Fault(POSITIONS, problem, "set it to null", positions)
    kind = _kind(scaling)
    if kind not in KINDS:
        problem = DYNAMIC if kind == "dynamic" else "is no kind of RoPE scaling that can be set here"
        remedy = f"set it to one of {', '.join(KINDS)}"
        yield Fault(f"{KEY}.rope_type", problem, remedy, "" if kind is None else kind)
        return
    known = {**COMMON, **KINDS[kind]}
    for name, value in scaling.items():
        if name not in (*known, "type"):
            yield unknown_key(name, known, value, is_ours=False).below(KEY)
        elif not fits(value, known.get(name, Text)):
            yield Fault(f"{KEY}.{name}", f"must be {allowed(known[name])}", "correct the value", value)
    for name in ("factor", *(KINDS[kind] if kind == "llama3" else ())):
        if name not in scaling:
            example = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}[name]
            yield Fault(f"{KEY}.{name}", f"is missing, and {kind} needs it", f"set it, such as to {example}")


def describe(scaling: Mapping[str, Any] | None) -> str:
    """``RoPE yarn × 4``; empty without scaling."""
    return f"RoPE {_kind(scaling)} × {scaling['factor']:g}" if scaling else ""


def configure(config: Any, scaling: Mapping[str, Any] | None, positions: int | None) -> None:
    """Write the scaling, and the number of positions that the model then has, into the configuration of a model.

    Raises:
        ConfigError: the model has no rotary position embeddings, or some that have another meaning.
    """
    if scaling is None and positions is None:
        return
    text = config.get_text_config()
    before = getattr(text, "rope_parameters", None) or {}
    nested = isinstance(before.get("full_attention"), dict)  # by kind of layer: those with a window keep theirs
    own = before["full_attention"] if nested else before
    if (positions is not None and not hasattr(text, "rope_theta") and not own) or (scaling and "rope_theta" not in own):
        key = POSITIONS if scaling is None else KEY
        problem = "this model has no rotary position embeddings"
        raise ConfigError(Fault(f"model.{key}", problem, "set it to null"))
    if scaling is None:
        text.max_position_embeddings = positions
        return
    if own.get("rope_type") not in REPLACEABLE:
        problem = f"the rotary position embeddings of this model are of the kind {own.get('rope_type')}"
        raise ConfigError(Fault(f"model.{KEY}", problem, "set it to null", dict(scaling)))
    kind, factor = _kind(scaling), float(scaling["factor"])
    original = int(scaling.get(ORIGINAL) or _original(own, text.max_position_embeddings))
    kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
    given = {name: value for name, value in scaling.items() if name not in ("type", ORIGINAL)}
    new = {**kept, **given, "rope_type": kind, "factor": factor, **({ORIGINAL: original} if kind != "linear" else {})}
    text.max_position_embeddings = int(original * factor)
    text.rope_parameters = {**before, "full_attention": new} if nested else new


def check_used(model: Any, scaling: Mapping[str, Any] | None) -> None:
    """Check that the model computes with the scaling of its configuration.

    Raises:
        ConfigError: its code has rotary position embeddings of its own.
    """
    if scaling is None:
        return
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    if not any(_kind(scaling) in (kind.values() if isinstance(kind, dict) else (kind,)) for kind in kinds):
        problem = f"{type(model).__name__} does not use the scaling of its configuration"
        raise ConfigError(Fault(f"model.{KEY}", problem, "set it to null", dict(scaling)))


def _kind(scaling: Mapping[str, Any]) -> Any:
    """transformers 4 calls the key ``type``."""
    return scaling.get("rope_type", scaling.get("type"))


def _original(own: Mapping[str, Any], positions: int) -> int:
    """The positions of pretraining, from a configuration that may be scaled already."""
    if ORIGINAL in own:
        return int(own[ORIGINAL])
    return int(positions / own["factor"]) if own.get("rope_type") == "linear" else positions
