"""The model below PEFT's wrapper, whichever there is."""

from __future__ import annotations

from fixtures.language_models import FAMILIES, adapted, build, with_virtual_tokens
from peft import PeftModel

from runner.models.kernels import base_model


def test_the_wrapper_of_peft_is_taken_off() -> None:
    plain = build(FAMILIES["llama"])
    assert base_model.of(plain) is plain
    for wrapped in (adapted(FAMILIES["llama"]), with_virtual_tokens(plain)):
        assert isinstance(wrapped, PeftModel)
        assert base_model.name(wrapped) == base_model.name(plain) == "LlamaForCausalLM"
    assert base_model.of(wrapped) is plain
