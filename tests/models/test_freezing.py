"""Full fine-tuning of a part of the model: which parameters are trained, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, composed, option, prepared
from fixtures import versions
from safetensors.torch import load_file

from runner.cli import main
from runner.errors import ConfigError
from runner.models import architecture, freezing, parameters, pretrained
from runner.models.quantization import none
from runner.train import worker

LAYERS = ("model.layers=4", "lora=none")


def model_of(*, ties: bool = True, **keys: Any) -> Any:
    source = architecture.resolve(option("model", "tiny", layers=4, tie_word_embeddings=ties)())
    return option("lora", "none", **keys)(pretrained.empty(source, none.none()))


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("count", "chosen"), [(1, [3]), (3, [1, 2, 3]), (-1, [0]), (-2, [0, 1])])
def test_the_last_or_the_first_layers_are_trained(count: int, chosen: list[int]):
    model = model_of(trainable_layers=count)
    names = [name for name, _ in model.named_parameters()]
    layers = tuple(f"model.layers.{number}." for number in chosen)
    assert trained_names(model) == {name for name in names if name.startswith(layers)}
    counted = sum(p.numel() for name, p in model.named_parameters() if name.startswith(layers))
    assert parameters.describe(model)["trainable"] == counted


@versions.peft_16
def test_lora_fa_trains_what_pefts_own_optimizer_trains():
    from peft.optimizers import create_lorafa_optimizer

    source = architecture.resolve(option("model", "tiny")())
    model, expected = (option("lora", "lora")(pretrained.load(source, none.none(), "cpu")) for _ in range(2))
    create_lorafa_optimizer(expected, r=8, lora_alpha=16, lr=1e-3)
    freezing.freeze_a(model)
    assert trained_names(model) == trained_names(expected)
    assert all(".lora_B." in name for name in trained_names(model))


def test_lora_fa_needs_an_a():
    source = architecture.resolve(option("model", "tiny")())
    with pytest.raises(ConfigError, match=r"lora\.freeze_a=.*: has no effect: no parameter is called lora_A"):
        option("lora", "lora_fa", target_modules=["embed_tokens"])(pretrained.empty(source, none.none()))


def test_names_are_matched_anywhere_and_by_several_patterns():
    model = model_of(ties=False, trainable=["norm", r"^lm_head"])
    names = [name for name, _ in model.named_parameters()]
    assert trained_names(model) == {name for name in names if "norm" in name or name == "lm_head.weight"}


def test_tied_weights_are_trained_under_both_names_or_not_at_all():
    with pytest.raises(ConfigError, match=r"also trains model\.embed_tokens\.weight: it is the same tensor"):
        model_of(trainable="lm_head")
    with pytest.raises(ConfigError, match=r"also trains lm_head\.weight"):
        model_of(trainable="embed_tokens")
    assert trained_names(model_of(trainable="lm_head|embed_tokens")) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"trainable": "q_porj"}, r"q_porj: matches no parameter.*\n.*names here: lm_head\.weight, model\.norm"),
        ({"trainable": ["norm", "bias$"]}, r"bias\$: matches no parameter"),
        ({"trainable_layers": 4}, "the model has 4"),
        ({"trainable_layers": -9}, "the model has 4"),
        ({"trainable_layers": 0}, "other than 0"),
        ({"trainable": "("}, "is not a valid regular expression"),
        ({"trainable": "norm", "trainable_layers": 1}, "cannot be combined"),
        ({"trainable": []}, "of length >= 1"),
    ],
)
def test_what_the_model_does_not_have_is_refused(keys: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        model_of(**keys)


def test_a_run_trains_these_weights_alone_and_says_how_many(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
):
    options = (*TINY, *LAYERS, "lora.trainable_layers=1", "train.max_steps=2", "optim.learning_rate=1e-2")
    rundir = prepared(tmp_path / "run", *options)
    assert worker.work(rundir) == 0
    model = model_of(trainable_layers=1)
    count = parameters.describe(model)["trainable"]
    share = f"{count / 1e6:.2f} M trained ({count / parameters.describe(model)['total']:.2%})"
    assert share in capsys.readouterr().err
    assert main.run(["plan", *options]) == 0
    assert f"{count / 1e6:.2f} M (" in capsys.readouterr().out
    source = architecture.resolve(option("model", "tiny", layers=4)())
    before = pretrained.load(source, none.none(), "cpu").state_dict()
    after = load_file(rundir.model / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == trained_names(model)
    saved = load_file(next(rundir.checkpoints.glob("step-000002")) / "trainable.safetensors")
    assert saved.keys() == trained_names(model)


def test_a_score_head_is_trained_with_them():
    cfg = composed(*TINY, *LAYERS, "task=reward", "data=chitchat_pairs", "lora.trainable=norm")
    from runner.train.options import Options

    options = Options(cfg)
    model = options.lora(pretrained.empty(architecture.resolve(options.model), options.quant))
    assert {name for name in trained_names(model) if "norm" not in name} == {"score.weight"}
