"""What is done otherwise with older libraries. ``scripts/check-versions`` runs these versions themselves."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from runner.errors import ConfigError
from runner.models.kernels import attention, compat
from runner.models.quantization.bitsandbytes import four_bit, int8


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed."""

    def pretend(**versions):
        monkeypatch.setattr(compat.importlib.metadata, "version", versions.__getitem__)

    compat.at_least.cache_clear()
    yield pretend
    monkeypatch.undo()
    compat.at_least.cache_clear()


def test_versions_are_compared_as_numbers(installed):
    installed(torch="2.10.0+cu130", transformers="5.0.0rc1")
    assert compat.at_least("torch", "2.6")
    assert not compat.at_least("transformers", "5"), "a release candidate comes before the release"


def test_peft_014_names_dora_layers_by_a_flag():
    before_016 = SimpleNamespace(use_dora={"default": True, "other": False})
    assert "default" in compat.lora_variants(before_016)
    assert "other" not in compat.lora_variants(before_016)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_installed_peft_names_dora_layers(use_dora):
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=2, use_dora=use_dora))
    assert ("default" in compat.lora_variants(adapted.base_model.model[0])) == use_dora


@pytest.mark.parametrize(
    ("versions", "masks"),
    [
        ({"transformers": "5.1.0", "torch": "2.9.0"}, True),
        ({"transformers": "4.57.6", "torch": "2.5.1"}, False),  # its mask of documents needs torch 2.6
        ({"transformers": "4.48.3", "torch": "2.9.0"}, False),
    ],
)
def test_documents_are_masked_here_where_transformers_does_not(installed, versions, masks):
    installed(**versions)
    config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=None, architectures=["LlamaForCausalLM"])
    model = SimpleNamespace(config=config, dtype=torch.float32, modules=lambda: iter(()))
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    given = attention.inputs(batch, True, model)
    assert ("attention_mask" not in given) == masks
    if not masks:
        seen = given["attention_mask"][0, 0] == 0
        assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("quant", [int8(), four_bit(kind="nf4", double=True, compute_dtype="auto")])
def test_quantization_without_a_gpu_needs_transformers_453(installed, quant):
    installed(transformers="4.52.4", bitsandbytes="0.49.1")
    with pytest.raises(ConfigError, match=r"(?s)transformers 4.52.4 .* on GPUs only.*install transformers >= 4.53"):
        quant.library_config("cpu")
    installed(transformers="4.53.0", bitsandbytes="0.49.1")
    compat.at_least.cache_clear()
    assert quant.library_config("cpu") is not None


def test_models_that_transformers_5_wrote_are_not_given_to_4(installed):
    installed(transformers="4.57.6")
    before = compat.model_cache()
    compat.at_least.cache_clear()
    installed(transformers="5.2.0")
    assert compat.model_cache() != before


def test_optimizers_of_bitsandbytes_without_a_gpu_need_050(installed):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    installed(bitsandbytes="0.49.1")
    with pytest.raises(ConfigError, match=r"(?s)0.49.1 has optimizers for GPUs only.*bitsandbytes >= 0.50"):
        compat.check_optimizer(groups)
    compat.check_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))]}])
    compat.at_least.cache_clear()
    installed(bitsandbytes="0.50.0")
    compat.check_optimizer(groups)


@pytest.mark.parametrize("before", [None, "1"])
def test_the_variable_of_the_compile_workers_is_the_users_again(before, monkeypatch):
    monkeypatch.delenv(compat.WARM_POOL, raising=False)
    if before is not None:
        monkeypatch.setenv(compat.WARM_POOL, before)
    with compat.without_compile_workers():
        assert os.environ[compat.WARM_POOL] == "0"
    assert os.environ.get(compat.WARM_POOL) == before


@pytest.mark.parametrize(("version", "keyword"), [("4.55.4", "torch_dtype"), ("4.56.0", "dtype"), ("5.23.0", "dtype")])
def test_the_dtype_is_named_as_transformers_names_it(version, keyword, installed):
    installed(transformers=version)
    assert compat.dtype_keyword() == keyword
