"""Each format reads its rows, refuses the others' by name, and never lets an untrainable one through."""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir

from runner.config import bind, code_files, user_code, user_function
from runner.data import formats, row_shape, splits
from runner.errors import ConfigError, DataError

EXCHANGE = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
ROWS = {
    "messages": {"messages": EXCHANGE},
    "sharegpt": {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
    "alpaca": {"instruction": "Two and two?", "input": "", "output": "Four."},
    "prompt_completion": {"prompt": "Two and two?", "completion": "Four."},
    "preference": {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."},
    "text": {"text": "Two and two are four."},
    "kto": {"prompt": "Two and two?", "completion": "Four.", "label": True},
}
CHOSEN, REJECTED = EXCHANGE[1], {"role": "assistant", "content": "Five."}
HUMAN, GPT, WRONG = ({"from": name, "value": text} for name, text in (("human", "Two and two?"), ("gpt", "Four."),
                                                                    ("gpt", "Five.")))  # fmt: skip
PAIRS = {
    "preference": ROWS["preference"],
    "preference_alpaca": {"instruction": "Two and two?", "input": "", "chosen": "Four.", "rejected": "Five."},
    "preference_sharegpt": {"conversations": [HUMAN], "chosen": GPT, "rejected": WRONG},
    "preference_swift": {"messages": EXCHANGE, "rejected_response": "Five."},
    "preference_openai": {"input": {"messages": EXCHANGE[:1]}, "preferred_output": [CHOSEN],
                          "non_preferred_output": [REJECTED]},
    "preference_llamafactory": {"chosen_messages": EXCHANGE, "rejected_messages": [EXCHANGE[0], REJECTED]},
}  # fmt: skip
JUDGED = {
    "kto": ROWS["kto"],
    "kto_messages": {"messages": EXCHANGE, "label": True},
    "kto_sharegpt": {"conversations": [HUMAN, GPT], "kto_tag": True},
}
ROWS = {**ROWS, **PAIRS, **JUDGED}
TASKS = {**dict.fromkeys(PAIRS, " task=dpo"), **dict.fromkeys(JUDGED, " task=kto")}


@functools.cache
def option(name: str, *overrides: str) -> Callable[..., formats.Example]:
    """The format as its YAML configures it."""
    with initialize_config_dir(str(bind.config_dir() / "data"), version_base="1.3"):
        return bind.bind(bind.to_plain(compose(f"format/{name}", list(overrides)))["format"], "data.format")


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt_completion"])
def test_every_format_reads_the_same_conversation(name):
    assert option(name)(ROWS[name]) == EXCHANGE


def test_text_is_text():
    assert option("text")(ROWS["text"]) == "Two and two are four."


LABELLED = {"label": {"text": "Two and two?", "label": "sum"}}


@pytest.mark.parametrize("name", [*ROWS, *LABELLED])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", [1, 2]), ("input_ids", [[1, 2]]), ("token_ids", "[1, 2]"), ("Tokens", [1.0]),
        ("chosen_input_ids", [1]), ("decoder_labels", [1]), ("target", "Four"), ("targets", ["Four"]),
    ],
)  # fmt: skip
def test_tokens_and_targets_of_another_program_are_refused_in_each_format(name, key, value):
    row = {**ROWS, **LABELLED}[name]
    with pytest.raises(DataError, match=f"the row has '{key}'.*is not used") as caught:
        option(name)({**row, key: value})
    assert re.search(rf"\+data\.format\.ignore=\[.*{key}", str(caught.value))
    assert option(name, f"+format.ignore=[{key}]")({**row, key: value}) == option(name)(row)


@pytest.mark.parametrize("name", [*ROWS, *LABELLED])
def test_counts_and_words_under_such_keys_are_allowed(name):
    row = {**ROWS, **LABELLED}[name]
    more = {"tokens": 512, "labels": ["bug"], "input_ids": [], "target": None, "targets": ""}
    assert option(name)({**row, **more}) == option(name)(row)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_a_row_of_another_format_is_refused_with_the_override_to_use(name, other):
    if name == other:
        option(name)(ROWS[name])
        assert row_shape.looks_like(ROWS[name]) == name
        return
    if (name, other) in {("messages", "kto_messages"), ("sharegpt", "kto_sharegpt"), ("prompt_completion", "kto")}:
        assert option(name)(ROWS[other]) == EXCHANGE  # a good answer may be learnt; a bad one is refused
        with pytest.raises(DataError, match=r"the row has '(label|kto_tag)'"):
            option(name)({**ROWS[other], **{key: False for key in ("label", "kto_tag") if key in ROWS[other]}})
        return
    with pytest.raises(DataError) as caught:
        option(name)(ROWS[other])
    message = str(caught.value)
    assert message.startswith(f"data/format={name}: ")
    assert f"The row looks like {other}" in message
    assert message.endswith(f"→ data/format={other}{TASKS.get(other, '')}")


TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_of_pairs_reads_the_same_pair(name):
    pair = {"prompt": EXCHANGE[:1], "chosen": CHOSEN, "rejected": REJECTED}
    assert option(name)(PAIRS[name]) == pair
    assert option(name)({**PAIRS[name], "tools": [TOOL]}) == {**pair, "tools": [TOOL]}
    for row in ({**PAIRS[name], "weight": 2}, {**PAIRS[name], "images": ["a.png"]}):
        with pytest.raises(DataError, match=r"the row has (a|')"):
            option(name)(row)


def test_other_shapes_of_pairs():
    pair = {"prompt": EXCHANGE[:1], "chosen": CHOSEN, "rejected": REJECTED}
    swift = {"messages": EXCHANGE, "rejected_messages": [EXCHANGE[0], REJECTED]}
    assert option("preference_swift")(swift) == pair
    assert row_shape.looks_like(swift) == "preference_swift"
    openai = {**PAIRS["preference_openai"], "input": {"messages": EXCHANGE[:1], "tools": [TOOL]}}
    assert option("preference_openai")(openai) == {**pair, "tools": [TOOL]}
    with_system = {**PAIRS["preference_alpaca"], "system": "Be brief.", "input": "As a word."}
    prompt = option("preference_alpaca")(with_system)["prompt"]
    assert [turn["content"] for turn in prompt] == ["Be brief.", "Two and two?\n\nAs a word."]
    other = {"messages": EXCHANGE, "rejected_messages": [CHOSEN, EXCHANGE[0], REJECTED]}
    with pytest.raises(DataError, match="the chosen and the rejected side have different prompts"):
        option("preference_swift")(other)
    with pytest.raises(DataError, match="the chosen and the rejected answer are equal"):
        option("preference_swift")({"messages": EXCHANGE, "rejected_response": "Four."})
    with pytest.raises(DataError, match="needs role and content"):
        option("preference_openai")({**PAIRS["preference_openai"], "preferred_output": ["Four."]})
    with pytest.raises(DataError, match="needs an object with messages under 'input'"):
        option("preference_openai")({**PAIRS["preference_openai"], "input": "Two and two?"})


def test_pairs_of_whole_conversations_may_repeat_the_prompt():
    read, sides = option("preference"), {"chosen": EXCHANGE, "rejected": [EXCHANGE[0], REJECTED]}
    pair = {"prompt": EXCHANGE[:1], "chosen": CHOSEN, "rejected": REJECTED}
    assert read(sides) == read({"prompt": "Two and two?", **sides}) == pair
    with pytest.raises(DataError, match="must be one answer of the assistant, it is: user, assistant"):
        read({"prompt": "Another one?", **sides})
    with pytest.raises(DataError, match="has no prompt under 'prompt', and 'chosen' is a text"):
        read({"chosen": "Human: Two? Assistant: Four.", "rejected": "Human: Two? Assistant: Five."})


def test_a_margin_may_be_the_text_of_a_number_and_be_ignored():
    row = {**PAIRS["preference"], "margin": "0.5"}
    assert option("preference")(row)["margin"] == 0.5
    assert "margin" not in option("preference")(row, ignore=["margin"])
    for margin in ("half", True, float("nan"), 1e300):
        with pytest.raises(DataError, match="is not a finite number"):
            option("preference")({**row, "margin": margin})


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


@pytest.mark.parametrize("key", ["text_pair", "sentence2", "hypothesis"])
def test_a_label_of_two_texts_is_refused(key):
    with pytest.raises(DataError, match=f"the row has '{key}'"):
        option("label")({"text": "a", key: "b", "label": 1})


def test_values_that_are_neither_text_nor_number_are_refused_with_their_place():
    rows = [("x.jsonl:1", {"text": "a", "label": b"b"}), ("x.jsonl:2", {"text": "a", "label": "b"})]
    with pytest.raises(DataError, match=r"x\.jsonl:1: contains a value of the type bytes"):
        splits.index(rows, option("label"), True, Counter())
    with pytest.raises(DataError, match="chat_template_kwargs cannot be parsed as JSON"):
        option("messages")({"messages": EXCHANGE, "chat_template_kwargs": "{enable_thinking"})
    with pytest.raises(DataError, match="contains a value of the type bytes"):
        option("messages")({"messages": EXCHANGE, "tools": [{"name": "f", "parameters": {"a": b"b"}}]})


@pytest.mark.parametrize("name", JUDGED)
def test_every_format_of_judged_answers_reads_the_same(name):
    assert option(name)(JUDGED[name]) == {"prompt": EXCHANGE[:1], "completion": CHOSEN, "label": True}
    key = "kto_tag" if name == "kto_sharegpt" else "label"
    assert option(name)({**JUDGED[name], key: False})["label"] is False
    assert option(name)({**JUDGED[name], "tools": [TOOL]})["tools"] == [TOOL]
    with pytest.raises(DataError, match="the label is 'good'"):
        option(name)({**JUDGED[name], key: "good"})
    with pytest.raises(DataError, match=r"the row has (a|')"):
        option(name)({**JUDGED[name], "weight": 2})


def test_a_row_of_no_format_says_what_it_has():
    with pytest.raises(DataError, match=r"finds nothing \(keys here: question, answer\) under 'instruction'") as caught:
        option("alpaca")({"question": "?", "answer": "!"})
    assert "data.format.instruction=KEY" in str(caught.value)
    with pytest.raises(DataError, match="finds int under 'text'"):
        option("text")({"text": 3})


def test_keys_can_be_renamed():
    read = option("alpaca", "format.instruction=question", "format.output=answer")
    assert read({"question": "Two and two?", "answer": "Four."}) == EXCHANGE
    read = option("sharegpt", "format.speaker=who", "format.value=says", "+format.roles.bot=assistant")
    said = [{"who": "human", "says": "Two and two?"}, {"who": "bot", "says": "Four."}]
    assert read({"conversations": said}) == EXCHANGE


def test_alpaca_puts_the_input_below_the_instruction_and_takes_a_system_prompt():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    contents = [message["content"] for message in option("alpaca")(row)]
    assert contents == ["Be brief.", "Add.\n\n2, 2", "4"]
    assert len(option("alpaca")({**row, "input": None, "system": None})) == 2


def test_sharegpt_takes_a_system_prompt_and_refuses_unknown_speakers():
    row = {**ROWS["sharegpt"], "system": "Be brief."}
    assert option("sharegpt")(row)[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(DataError, match="unknown speaker 'bing'") as caught:
        option("sharegpt")({"conversations": [{"from": "bing", "value": "Hi"}]})
    assert "+data.format.roles.bing=user" in str(caught.value)


def test_prompt_and_completion_may_be_messages():
    assert option("prompt_completion")({"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}) == EXCHANGE
    assert option("prompt_completion")({"prompt": EXCHANGE[:1], "completion": "Four."}) == EXCHANGE


def test_contents_may_be_lists_of_text_parts():
    parts = [{"type": "text", "text": "Two and "}, {"type": "text", "text": "two?"}]
    assert option("messages")({"messages": [{"role": "user", "content": parts}, EXCHANGE[1]]}) == EXCHANGE
    with pytest.raises(DataError, match="only text can be trained on"):
        option("messages")({"messages": [{"role": "user", "content": [{"type": "image"}]}]})


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([*EXCHANGE[:1], {"role": "assistant", "content": " \n"}], "message 2, of the assistant, is empty"),
        ([*EXCHANGE[:1], {"role": "assistant", "content": None}], "message 2, of the assistant, is empty"),
        ([{"role": "assistent", "content": "Hi"}], "unknown role 'assistent'. did you mean 'assistant'"),
        (EXCHANGE[:1], "has no assistant turn"),
        ([], "has no assistant turn"),
        ([{"role": "user"}], "message 1 needs role and content, it has role"),
        (["Hi"], "message 1 needs role and content, it has str"),
    ],
)
def test_conversations_that_cannot_be_trained_on(messages, problem):
    with pytest.raises(DataError) as caught:
        option("messages")({"messages": messages})
    assert problem in str(caught.value)
    assert caught.value.faults[0].remedy


def test_an_empty_text():
    with pytest.raises(DataError, match="the text under 'text' is empty"):
        option("text")({"text": " "})


@pytest.fixture
def own(tmp_path):
    """A file of row functions."""
    file = tmp_path / "rows.py"
    file.write_text(
        textwrap.dedent("""
            def to_messages(row):
                return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

            def to_text(row):
                return row["q"]

            def to_nothing(row):
                return None

            def to_the_end(row):
                raise SystemExit(0)

            number = 3
        """)
    )
    return file


def custom(function: object) -> Callable[..., formats.Example]:
    cfg = {"data": {"format": {"_target_": "runner.data.formats.custom", "function": str(function)}}}
    user_code.settle(cfg)
    return bind.bind(cfg["data"]["format"], "data.format")


def source_text(function: str) -> str:
    return user_function.source_text(function, ())


def test_a_function_of_ones_own_from_a_file(own):
    row = {"q": "Two and two?", "a": "Four."}
    assert custom(f"{own}:to_messages")(row) == EXCHANGE
    assert custom(f"{own}:to_text")(row) == "Two and two?"
    assert "def to_messages" in source_text(f"{own}:to_messages")


def test_a_function_of_ones_own_from_a_module(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    assert custom("rows:to_messages")({"q": "Two and two?", "a": "Four."}) == EXCHANGE


BESIDE = {
    "rows_of_mine.py": "import wording_of_mine\nfrom parts_of_mine.inner import dot\n"
    "from plain_of_mine.deep.mark import mark\n"
    "def to_text(row):\n    return wording_of_mine.told(row) + dot + mark\n",
    "wording_of_mine.py": "import json\ndef told(row):\n    import phrases_of_mine\n    return phrases_of_mine.first\n",
    "phrases_of_mine.py": "import rows_of_mine\nfirst = 'A phrase'\n",
    "plain_of_mine/deep/mark.py": "mark = ''\n",
    "json/not_that_one.py": "",
    "parts_of_mine/__init__.py": "",
    "parts_of_mine/inner.py": "from .outer import dot\n",
    "parts_of_mine/outer.py": "dot = '.'\n",
    "unrelated.py": "no Python (\n",
}


def test_what_a_file_imports_from_its_own_folder_belongs_to_the_function(tmp_path):
    for name, text in BESIDE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    file = tmp_path / "rows_of_mine.py"
    found = [name for name, _ in code_files.files([file])]
    assert found == sorted(BESIDE.keys() - {"unrelated.py", "json/not_that_one.py"})
    assert custom(f"{file}:to_text")({}) == "A phrase."
    before = source_text(f"{file}:to_text")
    (tmp_path / "unrelated.py").write_text("other")
    assert source_text(f"{file}:to_text") == before
    (tmp_path / "parts_of_mine/outer.py").write_text("dot = '!'")
    assert source_text(f"{file}:to_text") != before
    (tmp_path / "parts_of_mine/outer.py").write_bytes("# coding: latin-1\ndot = 'é'".encode("latin-1"))
    assert source_text(f"{file}:to_text") != before


def test_the_text_of_a_function_without_imports_is_that_of_its_file(own):
    assert source_text(f"{own}:to_text") == own.read_text()


def test_what_a_function_gives_is_checked(own):
    with pytest.raises(DataError, match="gave NoneType"):
        custom(f"{own}:to_nothing")({})
    with pytest.raises(DataError, match="failed on this row: KeyError: 'q'"):
        custom(f"{own}:to_messages")({})
    with pytest.raises(DataError, match="is empty"):
        custom(f"{own}:to_messages")({"q": "?", "a": ""})
    with pytest.raises(DataError, match="failed on this row: SystemExit: 0"):
        custom(f"{own}:to_the_end")({})


def test_functions_that_cannot_be_had(own):
    broken = own.with_name("broken.py")
    broken.write_text("def f(:\n")
    for function, problem in {
        "rows": "must be path/to/file.py:name or package.module:name",
        f"{own.parent}/none.py:f": "no such file or module",
        "no.such.module:f": "no such file or module",
        f"{own}:to_mesages": "did you mean 'to_messages'?",
        f"{broken}:f": "is not Python",
    }.items():
        with pytest.raises(ConfigError) as caught:
            custom(function)
        shown = function.replace(f"{own.parent}/", "") if "none" not in function else function
        assert str(caught.value).startswith(f"data.format.function={shown}: ")
        assert problem in str(caught.value)


def test_a_file_that_fails_when_it_is_run(own):
    own.with_name("raises.py").write_text("import no_such_package\ndef f(row): return ''\n")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        custom(f"{own.parent}/raises.py:f")({})
    with pytest.raises(ConfigError, match="defines no function 'number'"):
        custom(f"{own}:number")({})
