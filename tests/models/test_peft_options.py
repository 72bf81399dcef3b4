"""PEFT's methods and options, checked against PEFT itself before a model is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from runner.models import peft_options


def faults(method: str, **options: Any) -> list[str]:
    return [str(fault) for fault in peft_options.faults(method, options)]


def test_every_method_of_peft_is_supported_or_refused_with_a_reason() -> None:
    everything = {str(getattr(kind, "value", kind)).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    supported = set(peft_options.methods())
    assert {"lora", "ia3", "vera", "oft"} <= supported <= everything
    for method in everything - supported:
        (fault,) = faults(method)
        assert fault.startswith(f"method={method}: is not supported: ")
        assert "use one of " in fault


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("loraa", {}, "PEFT has no such method"),
        ("ia3", {"rank": 3}, "rank=3: no such key"),
        ("lora", {"task_type": "CAUSAL_LM"}, "task_type=CAUSAL_LM: is set by the runner"),
        ("lora", {"loftq_config": {}}, "is not supported by this train loop"),
        ("lora", {"init_lora_weights": "eva"}, "it needs passes over the data before training"),
        ("lora", {"r": "many"}, "r=many: must be a whole number"),
    ],
)
def test_a_wrong_option_is_one_message(method: str, options: dict[str, Any], text: str) -> None:
    (fault,) = faults(method, **options)
    assert text in fault


def test_the_case_of_a_method_does_not_matter() -> None:
    assert faults("LoRA", r=8, target_modules=["q_proj"]) == []
    assert peft_options.config_class("LoRA") is peft_options.config_class("lora")
