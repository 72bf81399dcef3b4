"""What belongs to an adapter that began with LoftQ: the base that it fits, and options that contradict it."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, composed, prepared

from runner.errors import ConfigError
from runner.models import loftq_base, pretrained, tokenizer_files
from runner.train import build, inputs, worker
from runner.train.options import Options

LOFTQ = ("quant=4bit", "lora.init_lora_weights=loftq", "lora.r=4", "lora.lora_alpha=12", "data.packing=false")


def test_an_adapter_is_trained_further_on_the_same_weights_alone(cache: Path, tmp_path: Path) -> None:
    rundir = prepared(tmp_path / "run", *TINY, *LOFTQ, "train.max_steps=1")
    assert worker.work(rundir) == 0
    start = f"lora.start={rundir.path}"
    words = (*TINY, "lora.r=4", "lora.lora_alpha=12", start)
    model = build.load_model(inputs.inputs(Options(composed(*words, "quant=4bit"))))
    pretrained.save(model, tokenizer_files.load(inputs.inputs(Options(composed(*TINY))).source), tmp_path / "next")
    assert (tmp_path / "next" / loftq_base.FILE).is_file()
    with pytest.raises(ConfigError, match=r"error of nf4 weights with double quantization, and here are fp4"):
        build.load_model(inputs.inputs(Options(composed(*words, "quant=fp4"))))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quant=none",), "begins with what 4-bit weights lose, and no weight is quantized → set quant=4bit"),
        (("quant=8bit",), "begins with what 4-bit weights lose, and these are in int8"),
        (("lora.use_dora=true",), "lora.use_dora=True: does not work with LoftQ"),
        (("lora.init_lora_weights=true", "lora.loftq_iter=2"), "lora.loftq_iter=2: has no effect"),
        (("lora.loftq_iter=0",), "lora.loftq_iter=0: must be"),
    ],
)
def test_what_loftq_cannot_do_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        composed(*TINY, *LOFTQ, *words)
    assert said in " ".join(str(refused.value).split())
