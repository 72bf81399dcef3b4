"""New tokens: one id each, rows that begin as the mean of their pieces and are trained alone; loaded by plain PEFT."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, option
from fixtures.model_folders import folder, local, source
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.cli import main
from runner.errors import ConfigError
from runner.models import architecture, parameters, pretrained, tokenizer_files
from runner.models.quantization import none
from runner.models.sources import ModelSource
from runner.tracking import manifest
from runner.tracking.rundir import RunDir
from runner.train import optim, trained_model

TOKENS = ("<call>", "</call>")
IDS = (259, 260)
"""Behind the 259 tokens of the tiny model."""


def tiny(**changes: Any) -> ModelSource:
    return architecture.resolve(option("model", "tiny", new_tokens=list(TOKENS), **changes)())


def lora(model: Any, **changes: Any) -> Any:
    return option("lora", "lora", **changes)(model)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_begins_as_the_mean_of_its_pieces(cache: Path, tied: bool) -> None:
    made = tiny(tie_word_embeddings=tied)
    tokenizer = tokenizer_files.load(made)
    assert tuple(tokenizer.convert_tokens_to_ids(TOKENS)) == IDS
    assert tokenizer("a<call>b", add_special_tokens=False)["input_ids"] == [
        *tokenizer("a", add_special_tokens=False)["input_ids"],
        259,
        *tokenizer("b", add_special_tokens=False)["input_ids"],
    ]
    assert tokenizer.decode([259], skip_special_tokens=True) == "<call>"
    model: Any = pretrained.load(made, none.none(), "cpu")
    plain: Any = pretrained.load(
        architecture.resolve(option("model", "tiny", tie_word_embeddings=tied)()), none.none(), "cpu"
    )
    pieces = AutoTokenizer.from_pretrained(made.path)("</call>", add_special_tokens=False)["input_ids"]
    assert len(pieces) == 7
    for ours, theirs in zip(ends(model), ends(plain), strict=True):
        assert torch.equal(ours[:259], theirs)
        torch.testing.assert_close(ours[260], theirs[pieces].mean(0))
    assert (ends(model)[0] is ends(model)[1]) is tied


def ends(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_new_rows_alone(cache: Path, tied: bool) -> None:
    made = tiny(tie_word_embeddings=tied)
    model = lora(pretrained.load(made, none.none(), "cpu"))
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens" in name}
    assert {tuple(p.shape) for p in rows.values()} == {(2, 64)}
    assert len(rows) == (1 if tied else 2)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in rows.values())
    kinds = {id(p): group["kind"] for group in optim.parameter_groups(model, 0.1) for p in group["params"]}
    assert {kinds[id(p)] for p in rows.values()} == {"embedding"}
    empty = lora(pretrained.empty(made, none.none()))
    assert parameters.describe(empty) == parameters.describe(model)


@pytest.mark.parametrize(
    "options", ["lora=lora", "lora=lora model.tie_word_embeddings=false", "lora=none", "quant=4bit"]
)
def test_a_run_trains_them_and_plain_peft_and_transformers_load_them(
    options: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"add {n}", "completion": f"<call>{n} + {n}</call>"} for n in range(40)]
    Path("calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*TINY, "data=local", "data.path=calls.jsonl", "data/format=prompt_completion", "train.max_steps=3",
             "model.new_tokens=['<call>','</call>']", "optim.learning_rate=0.02", *options.split()]  # fmt: skip
    words = [word for word in words if not word.startswith("data.train_rows")]
    assert main.run(["plan", *words]) == 0
    assert ", 2 new tokens, " in capsys.readouterr().out
    assert main.run([*words, "hydra.run.dir=run"]) == 0
    run = RunDir(tmp_path / "run")
    of_run = trained_model.Trained(run, manifest.read_config(run))
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    ids = torch.tensor([tokenizer("<call>7 + 7</call>")["input_ids"]])
    assert set(IDS) <= set(ids[0].tolist())
    ours = trained_model.load(of_run, "cpu")
    start = trained_model.load_base(of_run, "cpu")
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        if of_run.is_adapter:
            base = AutoModelForCausalLM.from_pretrained(of_run.base.path)
            base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))
            if "4bit" not in options:
                theirs = PeftModel.from_pretrained(base, run.model).eval()
                torch.testing.assert_close(theirs(input_ids=ids).logits, expected)
            saved = load_file(run.model / "adapter_model.safetensors")
            assert sum("embed_tokens" in name for name in saved) == 1, "rows, not the embeddings"
            before = start.get_input_embeddings().weight[list(IDS)]
            assert not torch.equal(before, next(v for k, v in saved.items() if "trainable_tokens" in k))
        arguments = ["--merged"] if of_run.is_adapter else []
        assert main.run(["export", "run", "whole", *arguments]) == 0
        whole = AutoModelForCausalLM.from_pretrained("whole").eval()
        assert whole.config.vocab_size == 261
        if "4bit" not in options:
            torch.testing.assert_close(whole(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert main.run(["generate", "run", "add 7", "--max-new-tokens", "4"]) == 0
    if of_run.is_adapter:
        assert main.run(["export", "run", "adapter"]) == 0
        assert (
            "base.resize_token_embeddings(max(len(tokenizer), base.config.vocab_size))"
            in Path("adapter/README.md").read_text()
        )


def test_what_cannot_be(cache: Path, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.new_tokens=\['<\|im_end\|>'\]: <\|im_end\|> is a token of this model"
    ):
        tokenizer_files.load(local(folder, new_tokens=["<|im_end|>"]))
    with pytest.raises(ConfigError, match=r"names <call> twice"):
        local(folder, new_tokens=["<call>", "<call>"])
    model = pretrained.empty(local(folder, new_tokens=["<call>"]), none.none())
    with pytest.raises(ConfigError, match=r"lora: does not train the embeddings of new tokens \(model\.new_tokens\)"):
        option("lora", "peft", method="ia3")(model)


def test_rows_of_new_tokens_are_not_sharded() -> None:
    fsdp = ("parallel=fsdp", "launcher=accelerate", "launcher.processes=2", "model.new_tokens=[a_b]")
    with pytest.raises(ConfigError, match=r"parallel=fsdp cannot shard the rows of new tokens"):
        composed(*TINY, *fsdp)
    composed(*TINY, *fsdp, "lora=none")
