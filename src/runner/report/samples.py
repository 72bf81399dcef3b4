"""The held-out prompts of runs with the answers before and after training, for the page of ``compare``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from runner.report.results import Result
from runner.tracking.mlflow import store
from runner.tracking.mlflow.upload import TABLES_TAG
from runner.tracking.rundir import RunDir

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST_RUNS, MOST_PROMPTS, LONGEST = 40, 8, 4000
"""Limits: runs, prompts of a run, characters of a text."""
CALLS_AT_ONCE = 8
Samples = list[dict[str, str]]
"""Of each prompt: ``prompt``, ``reference``, ``before`` and ``after``, where the run has them."""


def gather(results: Sequence[Result], uri: str = "") -> tuple[dict[int, Samples], str]:
    """(Index of a run → its first samples, which of them could not be read; empty if all could).

    Read from the run folders, or from the MLflow store at ``uri`` for runs without a folder on this machine.
    """
    first = list(enumerate(results[:MOST_RUNS]))
    found = {number: of_folder(result.folder) for number, result in first if result.folder}
    missing = [(number, result) for number, result in first if uri and not result.folder and result.mlflow_id]
    problems: list[str] = []
    if missing:
        client = store.connect(uri)

        def read(result: Result) -> Samples:
            try:
                return _download(client, result.mlflow_id)
            except Exception as error:  # MLflow's stores raise many types; the page is complete without the answers
                problems.append(store.explained(error, uri))
                return []

        with ThreadPoolExecutor(CALLS_AT_ONCE if store.is_server(uri) else 1) as pool:
            answers = pool.map(read, [result for _, result in missing])
            found |= {number: each for (number, _), each in zip(missing, answers, strict=True)}
    note = f"the answers of {len(problems)} runs could not be read from MLflow: {problems[0]}" if problems else ""
    return {number: _shortened(found[number]) for number, _ in first if found.get(number)}, note


def of_folder(folder: str) -> Samples:
    """The samples in a run folder; an empty list if it has none."""
    try:
        found = json.loads(RunDir(Path(folder)).samples.read_text(encoding="utf-8"))
        return [{key: str(text) for key, text in sample.items()} for sample in found]
    except (OSError, ValueError, AttributeError, TypeError):  # missing or damaged
        return []


def _download(client: MlflowClient, run_id: str) -> Samples:
    """The samples that the run has in MLflow as a table; an empty list if it has none."""
    name = RunDir(Path()).samples.name
    tables = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG) or "[]")
    if name not in [each.get("path") for each in tables]:
        return []
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:
        table = json.loads(Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return [{key: str(text) for key, text in row.items() if text is not None} for row in rows]


def _shortened(samples: Samples) -> Samples:
    return [{key: text[:LONGEST] for key, text in sample.items()} for sample in samples[:MOST_PROMPTS]]
