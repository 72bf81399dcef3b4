"""Rows of texts with a label."""

from __future__ import annotations

import pytest
from fixtures.data_formats import option

from runner.errors import DataError


@pytest.mark.parametrize("key", ["text_pair", "sentence2", "hypothesis"])
def test_a_label_of_two_texts_is_refused(key):
    with pytest.raises(DataError, match=f"the row has '{key}'"):
        option("label")({"text": "a", key: "b", "label": 1})
