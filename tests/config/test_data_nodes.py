"""Data sets inside of ``data``: written in short, completed, and checked like ``data`` itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.config import check, data_nodes
from runner.config.command_line import opened, parse
from runner.config.compose import Composer
from runner.errors import ConfigError
from runner.sweep import algorithms
from runner.tracking import manifest


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n')
    return str(tmp_path / "rows.jsonl")


def composed(*overrides: str) -> dict[str, Any]:
    args = parse(list(overrides))
    with opened(args) as hydra:
        return Composer(hydra, args).single().cfg


def faults(*overrides: str) -> str:
    return "\n".join(map(str, check.faults_of(composed(*overrides))))


def test_a_source_is_completed_to_a_node_like_data(rows: str) -> None:
    data = composed("data=mix", f"data.sources.code.path={rows}", "data.sources.code.weight=0.3")["data"]
    own = composed("data=local", f"data.path={rows}")["data"]
    settings = {"max_length", "packing", "overlong", "deduplicate", "eval_fraction", "eval_rows", "train_rows", "evals",
                "where", "order_by", "system_prompt"}  # fmt: skip
    assert data["sources"]["code"] == {key: own[key] for key in own if key not in settings} | {"weight": 0.3}
    assert data_nodes.completed(data) == data
    assert data_nodes.each(data)["code"] == {key: value for key, value in own.items() if key != "evals"}


def test_a_source_may_have_another_option_and_format(rows: str) -> None:
    data = composed(
        "data=mix", "data/format=text", "data.sources.talk.source=chitchat", f"data.sources.a.path={rows}",
        f"data.sources.b.path={rows}", "data.sources.b.format=alpaca", f"data.sources.c.path={rows}",
        "data.sources.c.format.name=sharegpt", "data.sources.c.format.value=text", f"data.sources.d.path={rows}",
        "data.sources.d.format.key=body",
    )["data"]  # fmt: skip
    forms = {name: node["format"] for name, node in data["sources"].items()}
    assert {name: form["_target_"].rpartition(".")[2] for name, form in forms.items()} == {
        "talk": "messages", "a": "text", "b": "alpaca", "c": "sharegpt", "d": "text",
    }  # fmt: skip
    assert (forms["c"]["value"], forms["c"]["speaker"], forms["d"]["key"]) == ("text", "from", "body")
    assert data["sources"]["talk"]["_target_"] == "runner.data.sources.chitchat"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "data.sources: a mixture needs sources"),
        (["data.sources.a.path={rows}", "data.sources.a.wieght=1"], "data.sources.a.wieght=1: no such key"),
        (["data.sources.a.path={rows}", "data.sources.a.max_length=9"], "set data.max_length"),
        (["data.sources.a.path={rows}", "data.sources.a.weight=-1"], "data.sources.a.weight=-1: must be"),
        (["data.sources.a.path=nowhere.jsonl"], "data.sources.a.path=nowhere.jsonl: no such file"),
        (["data.sources.a.path={rows}", "data.sources.a.eval_fraction=0"], "data.sources.a.eval_fraction=0"),
        (["data.sources.a.path={rows}", "data.evals.a.path={rows}"], "give it another name"),
        (["data.sources.a=1"], "must be a group of keys"),
        (["data.sources.a.path={rows}", "data.evals.x.train_rows=3"], "holds for all data together"),
        (["data.sources.a.weight=0.1"], "data.sources.a.path: is missing"),
    ],
)
def test_what_cannot_be_mixed_is_refused(overrides: list[str], words: str, rows: str) -> None:
    assert words in faults("data=mix", *(text.format(rows=rows) for text in overrides))


def test_an_unknown_option_of_a_source_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.a\.source=hubb: no such option\. did you mean 'hub'"):
        composed("data=mix", "data.sources.a.source=hubb")
    with pytest.raises(ConfigError, match=r"data\.evals\.a\.format=alpacca: no such option\. did you mean 'alpaca'"):
        composed("data.evals.a.format=alpacca")
    with pytest.raises(ConfigError, match="it is a key of data=mix"):
        composed("data=local", "data.sources.a.path=x")


def test_evals_go_with_any_data_and_change_nothing_without_one(rows: str) -> None:
    assert not faults(f"data.evals.law.path={rows}", "data.evals.law.eval_rows=9")
    plain = composed()
    without = {**plain, "data": {key: value for key, value in plain["data"].items() if key != "evals"}}
    assert manifest.signature(plain) == manifest.signature(without)
    assert manifest.signature(plain) != manifest.signature(composed(f"data.evals.law.path={rows}"))


def test_paths_of_sources_are_frozen_as_absolute_ones(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(rows).parent)
    cfg = composed("data=mix", "data.sources.a.path=rows.jsonl", "data.evals.b.path=rows.jsonl")
    frozen = manifest.freeze(cfg)["data"]
    assert frozen["sources"]["a"]["path"] == frozen["evals"]["b"]["path"] == rows


def test_a_stream_needs_a_limit_of_its_rows() -> None:
    web = [f"data.sources.web.{each}" for each in ("source=hub", "path=a/b", "streaming=true")]
    assert "data.sources.web.train_rows=None: is null, and data.streaming=true" in faults("data=mix", *web)
    assert "data.sources.web.eval_rows=None" in faults("data=mix", *web, "data.sources.web.eval_rows=null")
    assert not faults("data=mix", *web, "data.sources.web.train_rows=100")


def test_each_set_is_an_objective_of_a_search(rows: str) -> None:
    sets = ["data=mix", f"data.sources.code.path={rows}", f"data.evals.law.path={rows}", "search=tpe",
            "search.space={optim.learning_rate: 'interval(1e-5,1e-3)'}"]  # fmt: skip
    for metric in ("eval/code/loss", "eval/law/token_accuracy"):
        direction = "minimize" if metric.endswith("loss") else "maximize"
        cfg = composed(*sets, f"search.objective={metric}", f"search.direction={direction}")
        assert not list(algorithms.check_combination(cfg))
    cfg = composed(*sets, "search.objective=eval/lax/loss")
    assert "eval/law/loss" in str(next(iter(algorithms.check_combination(cfg))))
