"""Rows of single answers with a verdict."""

from __future__ import annotations

import pytest
from fixtures.data_formats import ANSWER, EXCHANGE, JUDGED, TOOL, option

from runner.errors import DataError


@pytest.mark.parametrize("name", JUDGED)
def test_every_format_of_judged_answers_reads_the_same(name):
    assert option(name)(JUDGED[name]) == {"prompt": EXCHANGE[:1], "completion": ANSWER, "label": True}
    key = "kto_tag" if name == "kto_sharegpt" else "label"
    assert option(name)({**JUDGED[name], key: False})["label"] is False
    assert option(name)({**JUDGED[name], "tools": [TOOL]})["tools"] == [TOOL]
    with pytest.raises(DataError, match="the label is 'good'"):
        option(name)({**JUDGED[name], key: "good"})
    with pytest.raises(DataError, match=r"the row has (a|')"):
        option(name)({**JUDGED[name], "weight": 2})
