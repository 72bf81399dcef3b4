"""Fetching a model from the Hugging Face Hub, or saying in one message why it cannot be had."""

from __future__ import annotations

import os
from pathlib import Path

from runner.errors import ConfigError, Fault

SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
WEIGHT_FILES = ["model*.safetensors"]
SKIPPED = ["*/*", "consolidated*"]
"""Folders, and second copies of the weights in their makers' own layout: neither is read by transformers."""


def fetch(name: str, revision: str | None, *, weights: bool, code: bool) -> Path:
    """The local folder of a Hub model, downloaded if not in the cache; ``weights`` False: only the small files.

    Raises:
        ConfigError: within seconds, when the model, its revision, the permission or the Hub is missing.
    """
    from huggingface_hub import snapshot_download

    wanted = SMALL_FILES + (WEIGHT_FILES if weights else []) + (["*.py"] if code else [])
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=SKIPPED, etag_timeout=10)
        )
    except Exception as error:
        fault = _fault(name, revision, error)
        if fault is None:
            raise
        raise ConfigError(fault) from error


def _fault(name: str, revision: str | None, error: Exception) -> Fault | None:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    local = "or use a folder on this machine: model.path=DIR"
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        remedy = f"accept its licence at {page}, then {log_in}; {local}"
        return Fault("model.path", "is gated: its owners let in only whom they know", remedy, name)
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = "no such model on the Hub, or a private one that your token does not open"
        return Fault("model.path", problem, f"correct the name ({page}); if it is private, {log_in}; {local}", name)
    if isinstance(error, errors.RevisionNotFoundError):
        remedy = f"name a branch, tag or commit listed at {page}/commits, or null for the latest"
        return Fault("model.revision", f"no such revision of {name}", remedy, revision)
    if "No space left" in str(error):
        return Fault("model.path", "no space left to download it", "free space, or move the cache with HF_HOME", name)
    if not isinstance(error, errors.LocalEntryNotFoundError | errors.HfHubHTTPError | OSError):
        return None
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    state = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_reason(error)})"
    problem = f"is not in the cache ({constants.HF_HUB_CACHE}), and {state}"
    online = "unset HF_HUB_OFFLINE" if offline else "check the connection, HTTPS_PROXY and HF_ENDPOINT"
    return Fault("model.path", problem, f"{online}; {local}; or model=smollm2, which needs no network", name)


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).splitlines() or [type(cause).__name__])[0][:160]
