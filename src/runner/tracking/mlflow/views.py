"""How an experiment opens in MLflow's pages: in training mode, with columns and charts that begin with the loss.

MLflow 3 has no default view of an experiment, but views to share: a tag of the experiment with JSON, which an address
names (``?viewStateShareKey=runner``, in MLflow's useSharedExperimentViewState.ts). MLflow 2.22 reads the same tag.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.tracking.metrics_log import LOSS

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "runner"
"""The name of the view in the address of an experiment's page."""
TAG, KIND_TAG = f"mlflow.sharedViewState.{KEY}", "mlflow.experimentKind"
TRAINING = "custom_model_development"
"""MLflow's name of an experiment that trains models; without it MLflow guesses, and may open its mode for GenAI."""
SPEED = "train/tokens_per_second"
MEMORY = ("memory/peak_allocated_gib", "memory/peak_rss_gib")
BEST = "best"
"""A sweep's parent run has the metrics of its best run with this prefix: its runs are folded at first."""
ON_PARENT = (SPEED, *MEMORY)
"""Those that it has without the prefix, too, as no one ranks runs by them: MLflow's table has room for five columns."""
COLUMNS = (f"{BEST}/{LOSS}", LOSS, SPEED, *MEMORY)
"""Metrics in the table."""
NAME = "attributes.`Run Name`"
WIDTH, NAME_WIDTH = 105, 250
"""Pixels of columns, so that all are in sight beside MLflow's panels, and names are not cut."""
BAR = f"{BEST}/{LOSS}"
"""One bar for each folded sweep, beside the curves of runs: MLflow hides what has no data."""
LINES = (LOSS, "train/loss", SPEED, *MEMORY)
SECTIONS = ("eval", "train", "memory")
"""The first sections of the charts; MLflow adds the others, such as ``best/eval`` and its system metrics."""


def view() -> dict[str, Any]:
    """The state of MLflow's page of an experiment (ExperimentPageUIState.tsx in its sources)."""
    columns = [f"metrics.`{name}`" for name in COLUMNS]
    return {
        "selectedColumns": [*columns, *(f"attributes.`{name}`" for name in ("Duration", "Models", "Dataset"))],
        "columnOrder": [NAME, *columns],
        "columnWidths": {NAME: NAME_WIDTH, **dict.fromkeys(columns, WIDTH)},
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
        "compareRunSections": [
            {"uuid": f"{KEY}-{name}", "name": name, "display": True, "isReordered": True, "deleted": False,
             "isGenerated": True}
            for name in SECTIONS
        ],
        "compareRunCharts": [_bars(BAR), *map(_line, LINES)],
    }  # fmt: skip


def _chart(kind: str, metric: str) -> dict[str, Any]:
    """A chart of one metric in the section of its prefix; MLflow adds the charts of all other metrics."""
    section, _, name = metric.removeprefix(f"{BEST}/").rpartition("/")
    title = f"{BEST} {name}" if metric == BAR else name
    return {
        "type": kind, "uuid": f"{KEY}-{metric}", "metricSectionId": f"{KEY}-{section}", "metricKey": metric,
        "displayName": title, "isGenerated": True, "deleted": False, "runsCountToCompare": 10,
    }  # fmt: skip


def _bars(metric: str) -> dict[str, Any]:
    """The last value of each run. A generated chart would become a line over steps, with one point for each sweep."""
    return {**_chart("BAR", metric), "isGenerated": False}


def _line(metric: str) -> dict[str, Any]:
    """The values of each run over its steps."""
    return {
        **_chart("LINE", metric), "lineSmoothness": 0, "xAxisScaleType": "linear", "scaleType": "linear", "range": {},
        "xAxisKey": "step", "yAxisKey": "metric", "selectedXAxisMetricKey": "", "yAxisExpressions": [],
        "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def tags() -> dict[str, str]:
    """The tags of an experiment with this view."""
    return {KIND_TAG: TRAINING, TAG: json.dumps(view(), separators=(",", ":"))}


def keep(client: MlflowClient, experiment: str, existing: Mapping[str, str]) -> None:
    """Set the tags that are missing or old. A kind that the user chose stays; without the right to set tags none is."""
    from mlflow.exceptions import MlflowException

    wanted = {key: text for key, text in tags().items() if key == TAG or key not in existing}
    with contextlib.suppress(MlflowException):
        for key, text in wanted.items():
            if existing.get(key) != text:
                client.set_experiment_tag(experiment, key, text)
