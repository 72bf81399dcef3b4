"""Saved adapters are plain PEFT adapters of the original base."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import option
from fixtures import versions
from fixtures.adapters import load, logits, reloaded, train
from fixtures.model_folders import source
from safetensors.torch import load_file

from runner.models import architecture, pretrained, tokenizer_files
from runner.models.sources import ModelSource


@pytest.fixture(scope="module")
def untied(cache: Path) -> ModelSource:
    return architecture.resolve(option("model", "tiny", tie_word_embeddings=False)())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lora", {}),
        ("lora", {"modules_to_save": ["lm_head"]}),
        ("lora", {"modules_to_save": ["embed_tokens"]}),
        ("lora", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("lora", {"target_modules": r".*layers\.0\..*_proj", "init_lora_weights": "gaussian"}),
        pytest.param("lora", {"init_lora_weights": "orthogonal"}, marks=versions.peft_16),
        ("lora", {"init_lora_weights": "olora"}),
        ("dora", {}),
        ("rslora", {}),
        ("pissa", {}),
        ("pissa", {"init_lora_weights": "pissa"}),
        ("pissa", {"use_rslora": True, "lora_alpha": 16}),
        ("pissa", {"use_dora": True}),
        ("peft", {"method": "lora", "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "r": 4}),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_reads_back_the_same_logits(
    source: ModelSource, untied: ModelSource, tmp_path: Path, name: str, changes: dict[str, Any], tied: bool
) -> None:
    from peft import AutoPeftModelForCausalLM

    torch.manual_seed(0)
    where = source if tied else untied
    model = option("lora", name, **changes)(load(where))
    losses = train(model)
    assert losses[-1] < losses[0] - 0.02
    pretrained.save(model, tokenizer_files.load(where), tmp_path / "model")
    trained = logits(model)
    torch.testing.assert_close(logits(reloaded(where, tmp_path / "model")), trained, atol=2e-4, rtol=1e-4)
    # the adapter names its base, so that PEFT finds it alone
    torch.testing.assert_close(
        logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model")), trained, atol=2e-4, rtol=1e-4
    )


def test_saving_leaves_the_model_alone(source: ModelSource, tmp_path: Path) -> None:
    model = option("lora", "pissa")(load(source))
    train(model, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pretrained.save(model, tokenizer_files.load(source), tmp_path / "model")
    pretrained.save(model, tokenizer_files.load(source), tmp_path / "model")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_pissa_cuts_the_same_start_whatever_the_seed(source: ModelSource) -> None:
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = option("lora", "pissa")(load(source))
        drawn = torch.rand(1)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(1)), "the run's own random numbers must not move"
        starts.append(model.initial_adapter)
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_an_adapter_on_a_hub_model_names_its_id_and_commit(source: ModelSource, tmp_path: Path) -> None:
    base = load(source)
    base.name_or_path, base.config._commit_hash = "owner/name", "0" * 40  # as load() leaves a Hub model
    pretrained.save(option("lora", "lora")(base), tokenizer_files.load(source), tmp_path / "model")
    written = yaml.safe_load((tmp_path / "model" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/name", "0" * 40)


def test_an_adapter_on_a_snapshot_in_the_cache_of_the_hub_names_its_id_and_commit(
    source: ModelSource, tmp_path: Path
) -> None:
    base = load(source)
    base.name_or_path = f"/home/me/.cache/huggingface/hub/models--owner--name/snapshots/{'1' * 40}"
    pretrained.save(option("lora", "lora")(base), tokenizer_files.load(source), tmp_path / "model")
    written = yaml.safe_load((tmp_path / "model" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/name", "1" * 40)


def test_the_saved_pissa_adapter_is_a_plain_lora_of_twice_the_rank(source: ModelSource, tmp_path: Path) -> None:
    model = option("lora", "pissa", r=4)(load(source))
    pretrained.save(model, tokenizer_files.load(source), tmp_path / "model")
    written = yaml.safe_load((tmp_path / "model" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (8, 16, True)
    tensors = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert all(8 in tensor.shape for tensor in tensors.values())
    torch.testing.assert_close(logits(reloaded(source, tmp_path / "model")), logits(load(source)), atol=1e-4, rtol=1e-4)
