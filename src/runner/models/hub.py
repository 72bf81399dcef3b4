"""Download a model from the Hugging Face Hub, with one clear message for each kind of failure."""

from __future__ import annotations

import os
import re
from pathlib import Path

from runner.errors import ConfigError, Fault, first_line

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
WEIGHT_FILES = ["model*.safetensors"]
SKIPPED = ["*/*", "consolidated*"]
"""Subfolders, and copies of the weights in the vendor's own format: transformers reads neither."""

SNAPSHOT = re.compile(r"[/\\]models--((?:(?!--)[^/\\])+(?:--[^/\\]+)?)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
"""The end of the path of a snapshot: …/models--OWNER--NAME/snapshots/COMMIT."""


def fetch(name: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """The local folder of a Hub model, downloaded if it is not in the cache.

    ``weights``: also the weights, not only the small files. ``code``: also Python files.

    Raises:
        ConfigError: no such model or revision, no permission, or the Hub cannot be reached (detected within seconds).
    """
    from huggingface_hub import snapshot_download

    patterns = SMALL_FILES + (WEIGHT_FILES if weights else []) + (["*.py"] if code else [])
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=SKIPPED, etag_timeout=10
            )
        )
    except Exception as error:
        fault = _fault(name, revision, error)
        if fault is None:
            raise
        raise ConfigError(fault) from error


def published(path: str) -> tuple[str, str] | None:
    """(Hub id, commit) of a snapshot folder in the cache of huggingface_hub; None for any other path."""
    match = SNAPSHOT.search(path)
    return (match[1].replace("--", "/"), match[2]) if match else None


def _fault(name: str, revision: str | None, error: Exception) -> Fault | None:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    local = "or use a folder on this machine: model.path=DIR"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        remedy = f"accept the licence at {page}, then {log_in}; {local}"
        return Fault("model.path", "is a gated repository and your token has no access", remedy, name)
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = "no such model on the Hub, or it is private and your token has no access"
        return Fault("model.path", problem, f"correct the name ({page}); if it is private, {log_in}; {local}", name)
    if isinstance(error, errors.RevisionNotFoundError):
        remedy = f"use a branch, tag or commit listed at {page}/commits, or null for the latest"
        return Fault("model.revision", f"no such revision of {name}", remedy, revision)
    if "No space left" in str(error):
        remedy = "free disk space, or move the cache with HF_HOME"
        return Fault("model.path", "no disk space left for the download", remedy, name)
    if not isinstance(error, errors.LocalEntryNotFoundError | errors.HfHubHTTPError | OSError):
        return None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    state = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_reason(error)})"
    problem = f"is not in the cache ({constants.HF_HUB_CACHE}), and {state}"
    online = "unset HF_HUB_OFFLINE" if offline else "check the connection, HTTPS_PROXY and HF_ENDPOINT"
    return Fault("model.path", problem, f"{online}; {local}; or model=smollm2, which needs no network", name)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return first_line(cause, 160)
