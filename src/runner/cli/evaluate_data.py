"""Which rows ``evaluate`` reads: the run's eval split, or other rows chosen by overrides of ``data``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.config import check, command_line, compose, user_code
from runner.config.bind import TARGET
from runner.data import tokenization, vision
from runner.data.batches import Batches
from runner.data.encoding import Recipe
from runner.errors import ConfigError, Fault, first_line
from runner.train.run_summary import too_long
from runner.train.trained_model import Trained

HELD_OUT = "held_out"
KEPT = ("max_length", "packing", "overlong", "deduplicate", "system_prompt")
"""Keys of ``data`` that keep the run's values unless they are overridden."""
WITHOUT_EFFECT = {
    "data.eval_fraction": "the other rows were used for training; choose other data with data.path",
    "data.train_rows": "nothing is trained",
    "data.order_by": "nothing is trained",
}


def is_other(overrides: list[str]) -> bool:
    """Whether the overrides choose other rows than the run's eval split; then all of those rows are evaluated."""
    settings = {f"data.{key}" for key in (*KEPT, "eval_rows")}
    return any(_key(text) not in settings for text in overrides)


def node(frozen: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The run's node ``data`` with the overrides applied; for other rows ``eval_rows`` becomes null (all rows).

    Raises:
        ConfigError: an override of another key than ``data``, or an unknown key (suggests the nearest one).
    """
    if faults := list(_faults(overrides)):
        raise ConfigError(*faults)
    keys = {_key(text) for text in overrides}
    if "data" in keys:
        data = {**_composed(overrides), **{key: frozen.get(key) for key in KEPT if f"data.{key}" not in keys}}
    else:
        formats = [text for text in overrides if _key(text).startswith(("data/format", "data.format"))]
        choice = any(_key(text) == "data/format" for text in formats)
        data = {**frozen, **({"format": _composed(formats)["format"]} if choice else {})}
        _set(data, [text for text in overrides if not (choice and text in formats)])
        if not choice and "data.format.function" in keys:
            data["format"].pop(user_code.PATHS, None)
            user_code.settle({"data": data}, [Path.cwd()])
    if is_other(overrides) and "data.eval_rows" not in keys:
        data["eval_rows"] = None
    check.check_data(data)
    return data


def batches(run: Trained, data: dict[str, Any], *, are_other: bool) -> tuple[Batches, dict[str, Any], str]:
    """(batches to evaluate, details of their rows for the record, default name of the metrics).

    ``data``: the node of ``node``; ``are_other``: other rows than the run's eval split.
    """
    from runner.models import architecture
    from runner.train import inputs
    from runner.train.options import Options

    options = Options({**run.cfg, "data": data})
    if not are_other:
        splits, _, held_out = inputs.load_data(options, run.result, run.tokenizer)
        report = replace(splits.report, truncated=0)  # the count includes training rows
        same_rows = {**data, "packing": None} == {**run.cfg["data"], "packing": None}
        name = HELD_OUT if same_rows else f"{HELD_OUT}_{report.eval_rows}"
        return held_out, _details(splits.name, splits.digest, splits.uri, report), name
    settings, (given, *others) = options.data, options.sources.values()
    if others:
        problem, remedy = "evaluates on one data set", "name it: data=local data.path=FILE"
        raise ConfigError(Fault("data", problem, remedy, "mix"))
    source = given.source()
    architecture.check_max_length(run.result, settings.max_length)
    recipe = Recipe(given.format, options.task, run.tokenizer, given.settings)
    tokenised = tokenization.every_row(source, recipe)
    rows, report = tokenised.eval, tokenised.report
    if report.truncated or report.dropped:
        print(f"warning: {too_long(options, report)}", file=sys.stderr)
    if source.eval is None:
        _warn_of_trained_rows(run, source.digest)
    every_row = Batches(
        rows, packing=settings.packing, max_length=settings.max_length,
        rows_per_batch=options.train.rows_at_a_time, accumulation=1, seed=options.seed, shuffle=False,
        pad_id=run.tokenizer.pad_token_id, vision=vision.of(run.tokenizer),
    )  # fmt: skip
    return every_row, _details(source.name, source.digest, source.uri, report), source.name


def _details(name: str, digest: str, uri: str, report: tokenization.DataReport) -> dict[str, Any]:
    counts = {"rows": report.eval_rows, "tokens": report.eval_tokens, "trained_tokens": report.eval_trained_tokens}
    return {**counts, "truncated": report.truncated, "data": {"name": name, "digest": digest, "uri": uri}}


def _warn_of_trained_rows(run: Trained, digest: str) -> None:
    if (run.rundir.read_manifest().get("data") or {}).get("digest") == digest:
        problem = "warning: the run was trained on these rows; leave data.path out to evaluate on its eval split"
        print(problem, file=sys.stderr)


def _faults(overrides: list[str]) -> Iterator[Fault]:
    for text in overrides:
        key, _, value = text.partition("=")
        plain = key.lstrip("+~")
        if "=" not in text:
            yield Fault(text, "is not an override", "write data.key=value; options begin with --")
        elif plain in WITHOUT_EFFECT:
            yield Fault(plain, f"has no effect here: {WITHOUT_EFFECT[plain]}", "leave it out", value)
        elif plain.replace("/", ".").split(".")[0] != "data":
            problem = "cannot be changed: the model is evaluated as it was trained"
            yield Fault(plain, problem, "only data=…, data/format=… and data.key=… can be changed", value)


def _composed(overrides: list[str]) -> dict[str, Any]:
    """The node ``data`` as Hydra composes it."""
    args = command_line.parse(overrides)
    with command_line.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if composer.is_sweep():
            raise ConfigError(_one_value("evaluate"))
        job = composer.single()
        user_code.settle(job.cfg, job.code_folders)
        return dict(job.cfg["data"])


def _set(data: dict[str, Any], overrides: list[str]) -> None:
    """Set single keys of the node; values are parsed by Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_override(text.lstrip("+"))
        except HydraException as error:
            problem = f"cannot be parsed: {first_line(error)}"
            raise ConfigError(Fault(_key(text), problem, "put it in quotes: 'data.path=\"a b\"'")) from error
        if parsed.is_sweep_override():
            raise ConfigError(_one_value(_key(text)))
        *above, last = _key(text).split(".")[1:] or [""]
        parent = data
        for name in above:
            parent[name] = dict(parent.get(name) or {})
            parent = parent[name]
        parent[last] = parsed.value()
    assert TARGET in data, "every option node has a _target_"


def _one_value(key: str) -> Fault:
    return Fault(key, "takes one value per key", "run evaluate once for each value")


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")
