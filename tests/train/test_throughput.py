"""FLOPs against torch's counter, speed against a clock set by hand."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from runner.train import throughput

LENGTH = 64
LLAMA = transformers.LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def build(config: transformers.PretrainedConfig = LLAMA) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


@pytest.mark.parametrize("adapt", [lambda model: model, with_lora], ids=["full", "lora"])
def test_flops_are_what_torch_counts(adapt) -> None:
    """Eager attention computes both halves and goes back at twice the cost: 12 T d a layer where we say 7 T d."""
    model, ids = adapt(build()), torch.randint(0, 512, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    attention = LENGTH * LLAMA.hidden_size * LLAMA.num_hidden_layers
    expected = counter.get_total_flops() / ids.numel() + (7 - 12) * attention
    # LoRA: torch spares the first layer's queries, keys and values the gradient of an input nobody trains.
    assert throughput.flops_per_token(model, LENGTH) == pytest.approx(expected, rel=0.03)


def test_the_backward_pass_ends_above_frozen_layers() -> None:
    """Forward alone, eager attention costs 4 T d a layer where we say 2 T d."""
    model, ids = build().requires_grad_(False), torch.randint(0, 512, (2, LENGTH))
    model.model.layers[2].requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = counter.get_total_flops() / ids.numel() - (5 + 2 + 2) * LENGTH * LLAMA.hidden_size
    assert throughput.flops_per_token(model, LENGTH) == pytest.approx(expected, rel=0.03)


def test_flops_of_a_known_model_by_hand() -> None:
    """6 N of the matrices with the tied head, and 7 T d for the attention of each layer."""
    hidden, wide, layers, vocabulary = 128, 384, 3, 512
    matrices = layers * (2 * hidden * hidden + 2 * hidden * 64 + 3 * hidden * wide) + vocabulary * hidden
    attention = 7 * LENGTH * hidden * layers
    assert throughput.flops_per_token(build(), LENGTH) == 6 * matrices + attention
    half_the_head = 6 * vocabulary * hidden / 2
    assert throughput.flops_per_token(build(), LENGTH, trained=0.5) == 6 * matrices + attention - half_the_head


def test_a_sliding_window_bounds_attention() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = build(transformers.MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=16))
    assert throughput.flops_per_token(model, 64) == throughput.flops_per_token(model, 16)


def test_only_the_experts_used_count() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4}

    def flops(used: int) -> float:
        return throughput.flops_per_token(
            build(transformers.MixtralConfig(**sizes, **heads, num_experts_per_tok=used)), 8
        )

    assert flops(2) - flops(1) == 6 * 3 * 32 * 48, "one more expert: three matrices"


def test_peak_of_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bf16, fp32 in (
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("Tesla T4", 65e12, 8.1e12),
        ("NVIDIA A10G", 70e12, 35e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert throughput.peak_flops(torch.device("cuda"), torch.bfloat16) == bf16
        assert throughput.peak_flops(torch.device("cuda"), torch.float32) == fp32
        assert throughput.peak_flops(torch.device("cuda"), torch.bfloat16, tf32=True) == bf16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    assert throughput.peak_flops(torch.device("cuda"), torch.float32, tf32=True) == 156e12


def test_peak_of_a_cpu_is_the_best_ever_seen(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    first = throughput.peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < first < 1e14
    [file] = (tmp_path / "meters").iterdir()
    kept = json.loads(file.read_text())
    assert kept["flops"] == first
    monkeypatch.setattr(throughput, "_measured_flops", lambda *_, **__: 5e9)  # a busy machine measures what it can
    assert throughput.peak_flops(torch.device("cpu"), torch.float32) == first, "measured a moment ago"
    for earlier, expected in ((1e15, 1e15), (1.0, 5e9)):
        file.write_text(json.dumps({**kept, "flops": earlier, "measured": kept["measured"] - throughput.RECENT_S}))
        assert throughput.peak_flops(torch.device("cpu"), torch.float32) == expected
        assert json.loads(file.read_text())["flops"] == expected
    file.write_text('{"flops"')
    assert throughput.peak_flops(torch.device("cpu"), torch.float32) == 5e9
    assert json.loads(file.read_text())["flops"] == 5e9, "a damaged file is replaced"


def test_meter_leaves_out_the_first_step_and_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 102.0, 152.0, 156.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter = throughput.Meter(flops_per_token=10.0, peak_flops=10_000.0)
    assert meter.rates() == {}
    meter.step(500, waited=1.0)  # compiles: 100 s
    assert meter.rates()["train/step_seconds"] == 100.0, "better than nothing while there is no other"
    meter.step(500, waited=0.5)  # 2 s
    assert meter.rates()["train/tokens_per_second"] == 250.0
    meter.pause()  # an evaluation of 50 s
    meter.step(700, waited=0.1)  # 4 s
    assert meter.rates() == pytest.approx(
        {
            "train/tokens_per_second": 200.0,
            "train/step_seconds": 3.0,
            "train/data_wait_fraction": 0.1,
            "train/mfu": 0.2,
        }
    )
    assert meter.rates() == meter.rates(), "reading changes nothing"


def test_the_speed_of_a_resumed_run_is_that_of_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 51.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter = throughput.Meter(flops_per_token=10.0, peak_flops=10_000.0)
    meter.resume(throughput.Timing(steps=3, tokens=900, seconds=9.0, waited=1.0))
    meter.step(500)  # this process warms up
    assert meter.rates()["train/tokens_per_second"] == 100.0
    meter.step(100)  # 1 s
    assert meter.rates()["train/tokens_per_second"] == 100.0
    assert meter.rates()["train/step_seconds"] == 1.0, "that is of the steps just now"
    assert meter.timing == throughput.Timing(steps=4, tokens=1000, seconds=10.0, waited=1.0)


def test_no_run_is_faster_than_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was measured beside other work is none."""
    clock = iter([0.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    meter = throughput.Meter(flops_per_token=10.0, peak_flops=500.0)
    for _ in range(3):
        meter.step(100)
    assert meter.rates()["train/mfu"] == pytest.approx(2 / 3), "of the best step, 1000 FLOP/s"
