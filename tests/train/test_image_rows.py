"""Runs on rows with images, from the plan to the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import composed, prepared
from fixtures import killed_runs, pictures

from runner.cli import main
from runner.errors import ConfigError
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import build, estimate, inputs
from runner.train.options import Options

pytestmark = pictures.needs_transformers_5

WORDS = ("model=tiny_vision", "data=local", "data.packing=false", "data.max_length=128", "data.eval_fraction=0.25",
         "tracking=offline", "train.per_device_batch_size=8", "train.sample_prompts=0", "train.eval_steps=null",
         "train.save_steps=2")  # fmt: skip


TWO = ("launcher=accelerate", "launcher.processes=2", "train.per_device_batch_size=4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return pictures.colour_rows(tmp_path_factory.mktemp("rows"), 24)


def said_of(rows: Path, *words: str) -> str:
    """What a plan with these words is refused with."""
    with pytest.raises(ConfigError) as caught:
        inputs.inputs(Options(composed(*WORDS, f"data.path={rows}", *words)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("task=pretrain",), "task=pretrain: task=pretrain does not train models that read images"),
        ((*TWO, "parallel=fsdp"), "parallel=fsdp: FSDP does not shard models that read images"),
        (("lora.init_lora_weights=eva",), "lora.init_lora_weights=eva: looks at rows without their images"),
        (("compile=regional",), "compile: is not proven for models that read images"),
        (("model.attention=by_document",), "model.attention=by_document: is not proven"),
        (("train.metrics=[exact_match]",), "train.metrics=['exact_match']: the model would answer prompts without"),
        (
            (*TWO, "parallel=ddp", "lora.train_vision=true"),
            "parallel.find_unused_parameters=False: is needed with lora.train_vision=true",
        ),
    ],
)
def test_what_is_not_proven_is_refused_by_name(rows: Path, words: tuple[str, ...], problem: str) -> None:
    assert problem in said_of(rows, *words)


def test_a_model_for_text_has_no_vision_tower_to_train(cache: Path) -> None:
    given = inputs.inputs(
        Options(composed("model=tiny", "data.train_rows=8", "lora.train_vision=true", "tracking=offline"))
    )
    with pytest.raises(ConfigError, match=r"lora\.train_vision=true: has no effect: the model reads text alone"):
        estimate.expect(given)


def test_virtual_tokens_have_no_id_by_which_images_are_found(rows: Path) -> None:
    more = ("lora=peft", "lora.method=prompt_tuning", "+lora.num_virtual_tokens=4")
    given = inputs.inputs(Options(composed(*WORDS, f"data.path={rows}", *more)))
    with pytest.raises(ConfigError, match=r"lora\.method=prompt_tuning: does not work on models that read images"):
        estimate.expect(given)


def test_the_plan_says_what_images_are(rows: Path) -> None:
    given = inputs.inputs(Options(composed(*WORDS, f"data.path={rows}", "data.packing=true")))
    (text,) = (text for label, text in given.notes if label == "images")
    assert text.startswith("24, 168 tokens stand for them (7 each); vision tower frozen")
    expected = estimate.expect(given)
    assert not expected.unknown
    pixels = 8 * 3 * 32 * 32 * 4  # of a batch, in float32
    assert expected.memory.activations > pixels
    assert estimate.expect(given).memory.activations == expected.memory.activations, "remembered"


def test_four_bits_are_for_the_language_model(rows: Path) -> None:
    given = inputs.inputs(Options(composed(*WORDS, f"data.path={rows}", "quant=4bit")))
    expected, model = estimate.expect(given), build.load_model(given)
    stored = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert stored
    assert all(".text_model.layers." in name for name in stored)
    assert expected.counts["quantized"] == sum(
        module.out_features * module.in_features for name, module in model.named_modules() if f"{name}.weight" in stored
    )


@pytest.mark.slow
def test_a_run_learns_what_is_in_the_images(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of all questions is the same: only the image tells the answers apart."""
    words = (*WORDS, f"data.path={rows}", "train.max_steps=60", "lora=none", "optim.learning_rate=5e-3")
    assert main.run([*words, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    run = RunDir(tmp_path / "run")
    (accuracy,) = [
        each["eval/token_accuracy"] for each in metrics_log.read(run) if each["step"] == 60 and "eval/loss" in each
    ]
    assert accuracy == 1.0
    image = pictures.square(tmp_path / "seen.png", "blue")
    capsys.readouterr()
    assert main.run(["generate", str(run.path), "--image", str(image), "Which colour?"]) == 0
    assert capsys.readouterr().out.strip() == "blue"


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(rows: Path, tmp_path: Path) -> None:
    words = (
        *WORDS,
        f"data.path={rows}",
        "data.packing=true",
        "train.max_steps=4",
        "optim.learning_rate=1e-2",
        "lora.lora_dropout=0.1",
    )
    whole, killed = (prepared(tmp_path / name, *words) for name in ("whole", "killed"))
    assert killed_runs.work(whole) == 0
    killed_runs.kill_and_finish(killed, "train/loss", [3])
    killed_runs.assert_same_end(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("lora.train_vision=true",), ("quant=4bit",)], ids=["all", "four bits"])
def test_the_merged_model_computes_what_was_trained(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    words = (*WORDS, f"data.path={rows}", "train.max_steps=3", "optim.learning_rate=1e-2", *more)
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main.run([*words, f"hydra.run.dir={run}"]) == 0
    before = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval/loss"]
    capsys.readouterr()
    assert main.run(["evaluate", str(run)]) == 0
    assert f"eval_held_out/loss  {before:.6g}" in capsys.readouterr().out
    assert main.run(["export", str(run), str(merged), "--merged"]) == 0
    assert "on 6 held-out rows" in capsys.readouterr().out or merged.exists()
    processor = AutoProcessor.from_pretrained(merged)
    assert AutoModelForImageTextToText.from_pretrained(merged).config.model_type == "idefics3"
    assert processor.image_processor.max_image_size["longest_edge"] == 32
    card = (merged / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "AutoModelForCausalLM" not in card
    for refused in (["export", str(run), "--gguf"], ["generate", str(run), "--serve"]):
        assert main.run(refused) == 2
        assert "reads images" in capsys.readouterr().err
