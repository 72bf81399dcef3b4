"""Log-probabilities of whole documents, against whole logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures import two_models

from runner.tasks import logprobs


@pytest.mark.parametrize("packing", [False, True])
def test_the_sums_are_those_of_each_document_alone(packing: bool, tmp_path: Path):
    policy, _, _ = two_models.load(two_models.write(tmp_path / "model"))
    documents = [list(range(5, 5 + length)) for length in (4, 9, 6)]
    features = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in documents]
    (batch,) = two_models.batches(features, at_once=1 if packing else 3, packing=packing).step(0)
    with torch.no_grad():
        sums, counts = logprobs.of_documents(policy, batch)
        expected = []
        for ids in documents:
            log_probabilities = policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected.append(sum(float(log_probabilities[place - 1, ids[place]]) for place in range(2, len(ids))))
    torch.testing.assert_close(sums.sort().values, torch.tensor(expected).sort().values, rtol=1e-5, atol=1e-5)
    assert sorted(counts.tolist()) == [2, 4, 7]
