"""Rows of data sets on the Hugging Face Hub, and what to do where they cannot be had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from runner.data import readers
from runner.data.readers import Place, Row
from runner.errors import DataError, Fault

HUB_TIMEOUT_SECONDS = 5.0
UNREACHABLE = {"ConnectionError", "TransportError", "Timeout", "TimeoutError"}
"""Exceptions of the Hub libraries, by class name, as their modules vary by version."""


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is set."""
    import huggingface_hub.constants

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def find_commit(path: str, revision: str | None) -> str:
    """Resolve a revision to its commit hash: one request with a short timeout, whereas `datasets` retries for 24 s."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:
        raise _hub_error(path, error) from error
    return str(info.sha)


def load_split(path: str, name: str | None, split: str, commit: str | None, streaming: bool = False) -> Any:
    """A split as a ``datasets.Dataset``, downloaded whole; with ``streaming`` a ``datasets.IterableDataset``.

    Raises:
        DataError: it cannot be reached, or does not exist.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return undecoded(datasets.load_dataset(path, name, split=split, revision=commit, streaming=streaming))
    except Exception as error:
        raise _hub_error(path, error) from error


def undecoded(rows: Any) -> Any:
    """A split with its images as the files have them, ``{"bytes", "path"}``: the processor of a model reads them."""
    import datasets

    as_files = datasets.Image(decode=False)
    for name, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, as_files)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, datasets.Sequence(as_files))
    return rows


def streamed(path: str, name: str | None, split: str, commit: str | None) -> Iterator[tuple[Place, Row]]:
    """The rows of a split, fetched from the Hub file by file as they are asked for.

    Raises:
        DataError: the Hub cannot be reached, or a row cannot be read.
    """
    if is_offline():
        problem = "reads the rows from the Hub, and HF_HUB_OFFLINE is set"
        raise DataError(Fault("data.streaming", problem, "unset HF_HUB_OFFLINE, or set data.streaming=false", True))
    yield from rows_of(load_split(path, name, split, commit, streaming=True), path, split)


def rows_of(rows: Iterable[Row], path: str, split: str) -> Iterator[tuple[Place, Row]]:
    """The rows of a split with their places.

    Raises:
        DataError: a row cannot be read.
    """
    name, number = f"{path}[{split}]", 0
    try:
        for number, row in enumerate(rows, start=1):
            yield Place(name, number, "row"), {key: readers.of_arrow(value) for key, value in row.items()}
    except Exception as error:
        if _kinds(error) & UNREACHABLE:  # of a stream
            raise _hub_error(path, error) from error
        if not isinstance(error, OSError | ValueError | TypeError | ImportError):
            raise
        # an image or a damaged file that cannot be decoded
        problem = f"{Place(name, number + 1, 'row')}: cannot be read: {error}"
        raise DataError(Fault("", problem, "leave the row or its column out, or download the dataset again")) from error


def _kinds(error: Exception) -> set[str]:
    """The names of the classes of an exception, and of what it came from."""
    return {kind.__name__ for cause in (error, error.__cause__, error.__context__) for kind in type(cause).__mro__}


def _hub_error(path: str, error: Exception) -> DataError:
    """Turn an exception of the Hub libraries into one message."""
    kinds = _kinds(error)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    own = "or use local files: data=local data.path=…"
    if "GatedRepoError" in kinds:
        problem = "is a gated dataset and your token has no access"
        remedy = f"accept the terms on the dataset's page, then {log_in}"
    elif "RevisionNotFoundError" in kinds:
        problem, remedy = "has no such revision", "correct data.revision, or set it to null for the latest"
    elif kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        problem = "no such dataset on the Hub, or it is private and your token has no access"
        remedy = f"correct the name; if it is private, {log_in}"
    elif "OfflineModeIsEnabled" in kinds or (is_offline() and "ConnectionError" in kinds):
        problem, remedy = "is not in the cache, and HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, {own}"
    elif kinds & UNREACHABLE:
        problem = "cannot be downloaded: the Hub cannot be reached"
        remedy = f"check the connection, HTTPS_PROXY and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses a cached copy; {own}"
    else:
        problem = " ".join(str(error).split())[:400] or type(error).__name__
        remedy = "correct data.path, data.name, data.split or data.eval_split"
    return DataError(Fault("data.path", problem, remedy, path))
