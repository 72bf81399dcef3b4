"""Rows of prompts without answers."""

from __future__ import annotations

import json

import pytest
from fixtures.data_formats import EXCHANGE, ROWS, option

from runner.errors import DataError


@pytest.mark.parametrize("name", ["preference", "kto", "prompts"])
def test_a_prompt_needs_a_text_and_no_list_that_is_written_as_text(name):
    row = {**ROWS.get(name, {"prompt": "Two and two?"})}
    option(name)(row)
    for prompt, problem in ((" ", "the prompt is empty"), (str(EXCHANGE), "is a list of messages, written as text"),
                            (json.dumps(EXCHANGE), "is a list of messages, written as text")):  # fmt: skip
        with pytest.raises(DataError, match=problem):
            option(name)({**row, "prompt": prompt})


@pytest.mark.parametrize("column", ["completions", "prompts", "images", "weight"])
def test_columns_of_prompts_that_cannot_reach_the_reward_functions(column):
    with pytest.raises(DataError, match=f"has (a column )?'{column}'"):
        option("prompts")({"prompt": "Two and two?", column: [2]})
