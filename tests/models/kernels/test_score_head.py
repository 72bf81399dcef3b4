"""The score head of a model: its names, its first values, its dtype, and where it gives scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures import two_models

from runner.errors import ConfigError
from runner.models import pretrained, sources
from runner.models.kernels import score_head
from runner.models.quantization import none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


def test_a_new_head_depends_on_the_seed_alone(folder: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        torch.rand(seed)
        chosen = score_head.ScoreHead(("reward",), "regression", seed=seed)
        options = {"revision": None, "dtype": "float32", "attention": "auto", "trust_remote_code": False}
        source = sources.pretrained(path=str(folder), **options)
        return pretrained.load(replace(source, head=chosen), none.none(), "cpu").score.weight.detach()

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    assert float(head(1).std()) == pytest.approx(0.02, rel=0.5)


CLASSES = score_head.ScoreHead(("good", "bad"), "single_label_classification")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def decoder() -> Any:
    config = transformers.LlamaConfig(**SIZES, pad_token_id=0)
    score_head.configure(config, CLASSES, "some/model")
    return transformers.LlamaForSequenceClassification(config).eval()


def test_the_configuration_names_the_outputs() -> None:
    config = decoder().config
    assert (config.id2label, config.label2id) == ({0: "good", 1: "bad"}, {"good": 0, "bad": 1})
    assert config.problem_type == "single_label_classification"
    of_classes = {"architectures": ["LlamaForSequenceClassification"], "id2label": {0: "red", 1: "blue"}}
    with pytest.raises(
        ConfigError, match=r"head for other classes \(red, blue\).*\n    → set task\.labels=\[red,blue\]"
    ):
        score_head.configure(transformers.LlamaConfig(**of_classes), CLASSES, "some/model")
    unnamed = transformers.LlamaConfig(**{**of_classes, "id2label": {0: "LABEL_0", 1: "LABEL_1"}})
    score_head.configure(unnamed, CLASSES, "some/model")
    assert unnamed.id2label == {0: "good", 1: "bad"}
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        score_head.configure(transformers.T5Config(), CLASSES, "some/model")


def test_a_decoder_gives_scores_at_every_position() -> None:
    model = decoder()
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(0))
    pooled = model(input_ids=ids).logits
    score_head.install(model, CLASSES)
    scores = model(input_ids=ids).logits
    assert scores.shape == (2, 5, 2)
    torch.testing.assert_close(scores[:, -1], pooled)
    assert score_head.of(model) is model.score
    assert score_head.modules(model) == [model.score]
    assert not score_head.is_encoder(model)
    assert score_head.configuration(model).architectures == ["LlamaForSequenceClassification"]


def test_an_encoder_scores_whole_rows_where_the_task_allows_it() -> None:
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(ConfigError, match="BertForSequenceClassification gives a whole row one score"):
        score_head.install(model, CLASSES)
    score_head.install(model, replace(CLASSES, allows_encoders=True))
    assert score_head.is_encoder(model)
    assert score_head.of(model) is None
    assert score_head.modules(model) == [model.classifier, model.bert.pooler], "the pooler is new in published models"


def test_the_head_computes_in_float32() -> None:
    model = decoder().bfloat16()
    score_head.install(model, CLASSES)
    score_head.in_float32(model)
    assert model.score.weight.dtype == torch.float32
    assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_language_model_has_no_score_head() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    assert (score_head.of(model), score_head.modules(model), score_head.is_encoder(model)) == (None, [], False)
