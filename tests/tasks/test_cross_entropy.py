"""Loss and packing, against transformers' own loss and against every document alone. Covers attention.py as well."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from runner.errors import ConfigError
from runner.models.kernels import attention, lm_head, varlen_attention
from runner.tasks import cross_entropy, task

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**GQA),
    "mistral": transformers.MistralConfig(**GQA, sliding_window=4),
    "qwen2": transformers.Qwen2Config(**GQA),
    "qwen2-sliding": transformers.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2": transformers.Gemma2Config(**GQA, head_dim=8, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=4),
    "phi3": transformers.Phi3Config(**GQA, sliding_window=4),
    "gpt-neox": transformers.GPTNeoXConfig(**SIZES),
}
MIXING = {
    "opt": transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "falcon": transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
}
PACKS = [[7, 9, 4], [12, 1, 1, 6]]
"""Lengths of the documents in each row of 20."""


def build(config: transformers.PretrainedConfig, implementation: str | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"attn_implementation": implementation} if implementation else {}
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)


def batch_of(packs: list[list[int]], trained: float = 0.5) -> dict[str, Tensor]:
    """Random ids; labels shifted, never across documents, about ``trained`` of them kept."""
    generator = torch.Generator().manual_seed(1)
    length = sum(packs[0])
    ends = torch.tensor([0, *(size for pack in packs for size in pack), 0]).cumsum(0).to(torch.int32)
    ids = torch.randint(3, 64, (len(packs), length), generator=generator)
    positions = torch.tensor([[at for size in pack for at in range(size)] for pack in packs])
    labels = ids.roll(-1, 1).masked_fill(positions.roll(-1, 1) == 0, cross_entropy.IGNORED)
    labels[torch.rand(labels.shape, generator=generator) > trained] = cross_entropy.IGNORED
    return {
        "input_ids": ids,
        "position_ids": positions,
        "labels": labels,
        "document_ends": ends,
        "longest": max(size for pack in packs for size in pack),
        "trained_at": (labels.flatten() != cross_entropy.IGNORED).nonzero()[:, 0],
    }


def with_virtual_tokens(model: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def task_loss(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """As the train loop asks for it."""
    return task.token_loss(model, {**batch, "packed": True})


@contextlib.contextmanager
def operations() -> Iterator[set[str]]:
    """The names of the operations that are called."""
    called: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function._schema.name.partition("::")[2])
            return function(*args, **(kwargs or {}))

    with Watch():
        yield called


def unshifted(labels: Tensor) -> Tensor:
    return torch.cat([torch.full_like(labels[:, :1], cross_entropy.IGNORED), labels[:, :-1]], 1)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_transformers_own(family: str) -> None:
    batch = batch_of([[20], [20]])
    reference, ours = build(FAMILIES[family]), build(FAMILIES[family])
    expected = reference(input_ids=batch["input_ids"], labels=unshifted(batch["labels"]), use_cache=False)
    expected.loss.backward()
    result = cross_entropy.sums(ours, batch)
    (result["loss"] / result["count"]).backward()
    assert result["count"] == (batch["labels"] != cross_entropy.IGNORED).sum()
    assert result["correct"] == (expected.logits.argmax(-1) == batch["labels"]).sum()
    torch.testing.assert_close(result["loss"] / result["count"], expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(reference), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("offered", ["mask", "positions", "all"])
def test_every_way_to_choose_positions_is_the_same(offered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = batch_of(PACKS), build(FAMILIES["gemma2"])
    assert cross_entropy._choice_offered(model) == "mask"
    expected = cross_entropy.sums(model, batch)
    monkeypatch.setattr(cross_entropy, "_choice_offered", lambda _: offered)
    torch.testing.assert_close(cross_entropy.sums(model, batch), expected, atol=1e-5, rtol=1e-6)


def test_chunks_and_eval_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model, again = batch_of(PACKS), build(FAMILIES["llama"]), build(FAMILIES["llama"])
    cross_entropy.sums(model, batch)["loss"].backward()
    with torch.no_grad():
        expected = cross_entropy.sums(model, batch)
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK_VALUES", 64 * 3)
    monkeypatch.setattr(cross_entropy, "EVAL_POSITIONS", 20)
    cross_entropy.sums(again, batch)["loss"].backward()
    torch.testing.assert_close(gradients(again), gradients(model), atol=1e-6, rtol=1e-5)
    seen = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy.sums(model, batch), expected, atol=1e-5, rtol=1e-6)
    assert [shape[0] for shape in seen] == (batch["labels"] != cross_entropy.IGNORED).sum(1).tolist(), (
        "one row at a time"
    )


def test_only_trained_positions_reach_the_head_and_logits_exist_once() -> None:
    batch, model = batch_of(PACKS, trained=0.3), build(FAMILIES["llama"])
    logits = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: logits.append(output))
    result = cross_entropy.sums(model, batch)
    assert logits[0].shape == (int(result["count"]), 64)
    probabilities = logits[0].detach().clone()  # by now softmax - one-hot
    torch.testing.assert_close(probabilities.sum(-1), torch.zeros(len(probabilities)), atol=1e-5, rtol=0)


def adapted(config: transformers.PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(2)
    return get_peft_model(build(config), LoraConfig(target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("family", [*FAMILIES, "cohere"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_the_head_in_the_loss_computes_the_same(
    family: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cohere scales its logits, which a product may; Gemma 2 caps them."""
    config = {**FAMILIES, "cohere": transformers.CohereConfig(**GQA, logit_scale=0.5)}[family]
    batch, reference, model = batch_of(PACKS), adapted(config), adapted(config)
    monkeypatch.setattr(cross_entropy, "CPU_HEAD_POSITIONS", 3)
    assert (lm_head.install(model, autocast) == "") == (family != "gemma2")
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found, expected = cross_entropy.sums(model, batch), cross_entropy.sums(reference, batch)
    found["loss"].backward(), expected["loss"].backward()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if autocast is None else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(gradients(model), gradients(reference), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy.sums(model, batch), cross_entropy.sums(reference, batch), atol=1e-5, rtol=1e-5
        )
    assert model.generate(batch["input_ids"][:, :4], max_new_tokens=2).shape == (2, 6), "it still has its head"


def test_with_the_head_in_the_loss_all_logits_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = batch_of(PACKS), adapted(FAMILIES["llama"])
    monkeypatch.setattr(cross_entropy, "CPU_HEAD_POSITIONS", 3)

    def rows_of_logits() -> int:
        seen = [0]

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                made = function(*args, **(kwargs or {}))
                is_view = function._schema.name == "aten::t"  # of the weight
                if isinstance(made, Tensor) and made.shape[-1:] == (64,) and not is_view:
                    seen.append(made.numel() // 64)
                return made

        with Watch():
            cross_entropy.sums(model, batch)["loss"].backward()
        return max(seen)

    assert rows_of_logits() == (batch["labels"] != cross_entropy.IGNORED).sum()
    assert lm_head.install(model) == ""
    assert rows_of_logits() == 3


@pytest.mark.parametrize("rows", [1, 3])
def test_no_shape_depends_on_what_only_the_device_knows(rows: int) -> None:
    """Or each micro-batch would wait for it. Fake tensors hold nothing that could be asked for."""
    model, batch = adapted(FAMILIES["llama"]), batch_of([[20]] * rows)
    assert lm_head.install(model) == ""
    del batch["position_ids"]  # of which transformers asks whether a row holds several documents
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        known = {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
        assert cross_entropy.sums(model, known)["loss"].requires_grad
        del known["trained_at"]
        with pytest.raises(DynamicOutputShapeException):
            cross_entropy.sums(model, known)


def test_a_head_that_is_trained_or_wrapped_stays_with_the_model() -> None:
    batch, reference, model = batch_of(PACKS), build(FAMILIES["llama"]), build(FAMILIES["llama"])
    assert lm_head.install(model) == ""
    cross_entropy.sums(model, batch)["loss"].backward(), cross_entropy.sums(reference, batch)["loss"].backward()
    torch.testing.assert_close(gradients(model), gradients(reference), atol=1e-6, rtol=1e-5)
    assert "lm_head.weight" in gradients(model) or "model.embed_tokens.weight" in gradients(model)
    saved = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    assert lm_head.install(get_peft_model(build(FAMILIES["llama"]), saved)) == "the LM head is not a plain nn.Linear"


def test_a_model_that_makes_more_of_its_logits_keeps_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILIES["llama"])
    forward = model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        made.logits = made.logits**2
        return made

    monkeypatch.setattr(model, "forward", squared)
    assert lm_head.install(model) == "the logits of LlamaForCausalLM are not the plain output of its head"
    assert lm_head.in_loss(model) is None


def test_bfloat16_is_summed_in_float32() -> None:
    batch, model = batch_of(PACKS), build(FAMILIES["llama"]).to(torch.bfloat16)
    result = cross_entropy.sums(model, batch)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    logits, labels = logits.float().flatten(0, 1), batch["labels"].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"], expected, atol=1e-3, rtol=1e-4)


def test_a_batch_that_trains_nothing_gives_zero_and_a_gradient_of_zero() -> None:
    batch, model = batch_of(PACKS, trained=0.0), build(FAMILIES["llama"])
    result = cross_entropy.sums(model, batch)
    result["loss"].backward()
    assert result["loss"] == result["count"] == result["correct"] == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_prompt_tuning_is_scored_behind_its_virtual_tokens() -> None:
    tuned = with_virtual_tokens(build(FAMILIES["llama"]))
    batch = batch_of([[20]])
    expected = tuned(input_ids=batch["input_ids"], labels=unshifted(batch["labels"]))
    result = cross_entropy.sums(tuned, {"input_ids": batch["input_ids"], "labels": batch["labels"]})
    torch.testing.assert_close(result["loss"] / result["count"], expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_are_as_alone(family: str, implementation: str) -> None:
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 caps its attention scores, which sdpa cannot")
    model, batch = build(FAMILIES[family], implementation).eval(), batch_of(PACKS)
    with torch.no_grad():
        together = model(**attention.inputs(batch, True, model)).logits
        for row, sizes in enumerate(PACKS):
            for ids, logits in zip(batch["input_ids"][row].split(sizes), together[row].split(sizes), strict=True):
                alone = model(input_ids=ids[None], use_cache=False).logits[0]
                torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    attention.check_isolation(model, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_by_document_is_that_of_a_mask(family: str) -> None:
    """Where a model slides a window or caps its scores, it stays with the mask."""
    reference, model, batch = build(FAMILIES[family]), build(FAMILIES[family]), batch_of(PACKS)
    before = model.config._attn_implementation
    suits = family in ("llama", "qwen2", "gpt-neox")
    assert (varlen_attention.install(model, batch["longest"]) == "") == varlen_attention.uses(model) == suits
    assert suits or model.config._attn_implementation == before
    with operations() as called:
        found = task_loss(model, batch)
    assert ("attention_by_document" in called) == suits
    expected = task_loss(reference, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    found["loss"].backward(), expected["loss"].backward()
    torch.testing.assert_close(gradients(model), gradients(reference), atol=1e-6, rtol=1e-4)


def test_a_window_longer_than_every_document_does_not_matter() -> None:
    assert not varlen_attention.install(build(FAMILIES["mistral"]), longest=4)
    assert "sliding_window" in varlen_attention.install(build(FAMILIES["mistral"]), longest=5)


def test_attention_by_document_answers_prompts_as_before() -> None:
    model = build(FAMILIES["llama"]).eval()
    prompts = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    expected = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    assert not varlen_attention.install(model, 20)
    assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), expected)


def test_the_operation_of_attention_by_document_is_sound() -> None:
    """torch's own check of custom operations: shapes, strides, gradients, tracing."""
    query, key, value = (torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 5, 12, 12], dtype=torch.int32)
    torch.library.opcheck(torch.ops.runner.attention_by_document.default, (query, key, value, ends, 0.3))


@pytest.mark.parametrize("family", MIXING)
def test_a_model_that_mixes_documents_is_refused(family: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.packing=True: .* attend to each other\n    → set data\.packing=false"
    ):
        attention.check_isolation(build(MIXING[family]), None)


def test_the_check_leaves_no_trace_and_sees_through_lora() -> None:
    model = get_peft_model(build(FAMILIES["mistral"]), LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    state = torch.get_rng_state()
    attention.check_isolation(model, None)
    assert torch.equal(state, torch.get_rng_state())
    assert not gradients(model)
    assert not model.get_input_embeddings()._forward_hooks


def test_prompt_tuning_cannot_be_packed() -> None:
    tuned = with_virtual_tokens(build(FAMILIES["llama"]))
    with pytest.raises(ConfigError, match="packing"):
        attention.check_isolation(tuned, None)


def test_the_mask_for_an_older_transformers_isolates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(FAMILIES["llama"]), batch_of(PACKS)
    expected = cross_entropy.sums(model, batch)
    monkeypatch.setattr(attention, "_masks_by_position", lambda: False)
    asked = attention.inputs(batch, True, model)
    assert asked["attention_mask"].shape == (2, 1, 20, 20)
    torch.testing.assert_close(cross_entropy.sums(model, {**batch, **asked}), expected, atol=1e-5, rtol=1e-6)
    attention.check_isolation(model, None)
    with pytest.raises(ConfigError, match="sliding window of 4"):
        attention.inputs(batch, True, build(FAMILIES["mistral"]))


def test_flash_attention_gets_one_row() -> None:
    model, batch = build(FAMILIES["llama"]), batch_of(PACKS)
    expected = cross_entropy.sums(model, batch)
    model.config._attn_implementation_internal = "flash_attention_2"
    asked = attention.inputs(batch, True, model)
    model.config._attn_implementation_internal = "sdpa"
    assert asked["input_ids"].shape == asked["position_ids"].shape == (1, 40)
    torch.testing.assert_close(cross_entropy.sums(model, {**batch, **asked}), expected, atol=1e-5, rtol=1e-6)


def test_without_packing_attention_is_plainly_causal() -> None:
    model, batch = build(FAMILIES["llama"]), batch_of([[20], [20]])
    asked = attention.inputs(batch, False, model)
    assert asked["input_ids"].shape == (2, 20)
    assert "attention_mask" not in asked
