"""A merged model computes what base and adapter do, or is refused."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import versions
from fixtures.trained_runs import _there, asked_plainly, logits, said, trained
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.cli import main
from runner.train import merge


def test_a_merge_that_changes_the_model_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    trained("first")
    merged = merge._merged

    def spoilt(model: Any) -> Any:
        model = merged(model)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
        return model

    monkeypatch.setattr(merge, "_merged", spoilt)
    code, _, err = said(capsys, "export", "first", str(tmp_path / "a/b"), "--merged")
    assert (code, "merging changed the logits by up to" in err) == (1, True)
    assert list(tmp_path.iterdir()) == []


# the model that the default run trains


@pytest.mark.parametrize("relative", [1e-5, 1e-12], ids=["rounding", "more than rounding"])
def test_where_float64_does_not_fit_a_part_of_the_largest_logit_is_allowed(
    relative: float, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained("first")
    monkeypatch.setattr(merge, "TOLERANCE", 0.0)
    monkeypatch.setattr(merge, "RELATIVE", relative)
    monkeypatch.setattr(merge, "_fits", lambda *_: False)
    code, out, err = said(capsys, "export", "first", str(tmp_path / "m"), "--merged", "--dtype", "float32")
    if relative > 1e-6:
        assert (code, "computed in float32" in out) == (0, True), err
    else:
        assert (code, "merging changed the logits by up to" in err, list(tmp_path.iterdir())) == (1, True, []), err


@pytest.mark.slow
def test_the_merged_default_model_has_the_logits_of_plain_peft(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """In float64, from the float32 weights in both folders: float32 itself rounds logits of 40 by nearly 1e-4."""
    folder = tmp_path / "run"
    assert main.run(["train.max_steps=1", "train.per_device_batch_size=2", "data.train_rows=20", "data.eval_rows=2",
                    "data.max_length=64", "train.sample_prompts=0", "train.eval_steps=null", "tracking=offline",
                    "optim.learning_rate=0.01", f"hydra.run.dir={folder}"]) == 0  # fmt: skip
    code, out, err = said(capsys, "export", str(folder), str(tmp_path / "merged"), "--merged")
    assert (code, "logits differ by" in out) == (0, True), err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert asked_plainly(merged, tokenizer, "What is the capital of France?", 3)
    unmerged = AutoPeftModelForCausalLM.from_pretrained(folder / "model", **versions.FLOAT32)
    text = "My favourite film is the one that I saw with my sister when we were little."
    ids = tokenizer(text)["input_ids"]
    torch.testing.assert_close(logits(merged, ids), logits(unmerged, ids), rtol=0, atol=2e-4)
    with unmerged.disable_adapter():
        assert (logits(merged, ids) - logits(unmerged, ids)).abs().max() > 0.01
    torch.testing.assert_close(logits(merged.double(), ids), logits(unmerged.double(), ids), rtol=0, atol=1e-4)
