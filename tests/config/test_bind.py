"""Binding: every fault at once, each with its key, its value, what is allowed and what to do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from omegaconf import OmegaConf

from runner.config import bind
from runner.errors import ConfigError, Fault, suggest


def option(
    model: Any,
    *,
    bits: Literal[4, 8],
    kind: Literal["nf4", "fp4"],
    ratio: Annotated[float, Ge(0), Lt(1)],
    path: str | None,
    names: list[str] | str,
    double: bool,
    extra: dict[str, int],
) -> tuple[Any, ...]:
    return model, bits, kind, ratio, path, names, double, extra


GOOD = {
    "bits": 4, "kind": "nf4", "ratio": 0, "path": None, "names": ["a"], "double": True, "extra": {"a": 1},
}  # fmt: skip


def check_companion(*, name: str) -> Any:
    if name == "bad":
        yield Fault("name", "is bad", "another", name)


def companion(*, name: str) -> str:
    return name


def test_good_values_bind_and_wait_for_the_runtime_object():
    assert bind.bind(GOOD, "quant", option)("model") == ("model", 4, "nf4", 0, None, ["a"], True, {"a": 1})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 5}, "one of 4, 8"),
        ({"bits": True}, "one of 4, 8"),
        ({"kind": "nf5"}, "did you mean 'nf4'?"),
        ({"ratio": 1.0}, "a finite number >= 0 and < 1"),
        ({"ratio": "x"}, "a finite number >= 0"),
        ({"ratio": float("inf")}, "a finite number"),
        ({"ratio": 10**400}, "a finite number"),
        ({"path": 3}, "a text or null"),
        ({"names": [1]}, "a list (each: a text) or a text"),
        ({"double": 1}, "true or false"),
        ({"extra": {"a": "b"}}, "a mapping"),
        ({"kinds": "nf4"}, "did you mean 'kind'?"),
        ({"device_map": "auto"}, "inference only"),
    ],
)
def test_each_wrong_value_names_key_value_and_remedy(change: dict[str, Any], said: str):
    (fault,) = bind.find_faults({**GOOD, **change}, "quant", option)
    assert fault.key == f"quant.{next(iter(change))}"
    assert fault.value == next(iter(change.values()))
    assert said in str(fault)
    assert fault.remedy


def test_all_faults_come_at_once():
    with pytest.raises(ConfigError) as caught:
        bind.bind({"bits": 3, "kindd": "nf4"}, "quant", option)
    keys = [fault.key for fault in caught.value.faults]
    assert keys[:2] == ["quant.bits", "quant.kindd"]
    assert set(keys[2:]) == {"quant.kind", "quant.ratio", "quant.path", "quant.names", "quant.double", "quant.extra"}


def test_bounds_of_all_four_kinds():
    def bounded(*, a: Annotated[int, Gt(1)], b: Annotated[int, Le(3)]) -> None: ...

    bounded.__module__ = __name__
    said = [str(fault) for fault in bind.find_faults({"a": 1, "b": 4}, "", bounded)]
    assert "whole number > 1" in said[0]
    assert "whole number <= 3" in said[1]


def test_the_companion_has_its_say_only_when_the_types_are_right():
    assert [f.key for f in bind.find_faults({"name": "bad"}, "x", companion)] == ["x.name"]
    assert "must be" in str(next(bind.find_faults({"name": 1}, "x", companion)))


@pytest.mark.parametrize(
    "target",
    ["os.system", "transformers.BitsAndBytesConfig", "runner", 3, None, "runner.nothing.here",
     "runner.models.quantization.bitsandbytes.four_bits", "runner.models.quantization.bitsandbytes._private"],
)  # fmt: skip
def test_only_our_own_options_may_be_named(target: object):
    with pytest.raises(ConfigError):
        bind.bind({"_target_": target}, "quant")


def test_a_misspelt_option_function_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"did you mean 'runner\.models\.quantization\.bitsandbytes\.four_bit'"):
        bind.bind({"_target_": "runner.models.quantization.bitsandbytes.four_bits"}, "quant")


def test_missing_values_are_all_named():
    with pytest.raises(ConfigError) as caught:
        bind.to_plain(OmegaConf.create({"a": "???", "b": {"c": "???"}, "d": 1}))
    assert [fault.key for fault in caught.value.faults] == ["a", "b.c"]


def test_an_interpolation_without_a_target_is_refused():
    with pytest.raises(ConfigError, match="not found"):
        bind.to_plain(OmegaConf.create({"a": "${nothing}"}))


def test_suggest_is_silent_when_nothing_is_near():
    assert suggest("zzz", ["alpha", "beta"]) == ""


def test_the_keys_of_all_groups_are_read_once_however_many_are_misspelt(monkeypatch: pytest.MonkeyPatch):
    assert bind.keys_named("warmup_steps") == ["schedule.warmup_steps"]
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: pytest.fail("a file is read again"))
    assert bind.keys_named("warmup_steps") == ["schedule.warmup_steps"]
    assert "optim.learning_rate" in bind.keys_named("learning_rate")
    assert bind.keys_named("no_such_key") == []
