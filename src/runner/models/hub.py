"""Download a model from the Hugging Face Hub, or upload one, with one clear message for each kind of failure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.errors import ConfigError, Fault, RunnerError, first_line
from runner.secrets import redact

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


def push_faults(key: str, name: str) -> Iterator[Fault]:
    """Why a folder cannot be uploaded to this repository of the Hub: its name, no access, no connection.

    ``key``: the option that names the repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        yield Fault(key, f"is no name of a repository ({first_line(error)})", "write it as OWNER/NAME", name)
        return
    if name.count("/") != 1:
        yield Fault(key, "has no owner", "write it as OWNER/NAME: your user name, or an organization of yours", name)
        return
    try:
        HfApi().whoami()
    except Exception as error:
        yield Fault(key, f"cannot be uploaded: {_push_reason(error)}", _LOG_IN, name)


def push(folder: Path, key: str, name: str, *, private: bool, left_out: Sequence[str] = ()) -> str:
    """Upload a folder as one commit to a model repository of the Hub, created if it is missing; returns its address.

    Files in the repository that the folder does not have stay there.

    Raises:
        RunnerError: the upload failed.
    """
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(name, private=private, exist_ok=True)
        message = "Upload by runner"
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=list(left_out))
    except Exception as error:
        remedy = f"the folder is written: hf upload {name} {folder} uploads it later"
        raise RunnerError(Fault(key, f"not uploaded: {_push_reason(error)}", remedy, name)) from error
    return str(url)


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write; or leave the option out"


def _push_reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no token of the Hub on this machine"
    if isinstance(error, errors.HfHubHTTPError):
        return redact(f"{constants.ENDPOINT} refuses it ({_reason(error)})")
    if _is_offline():
        return "HF_HUB_OFFLINE is set"
    return redact(f"{constants.ENDPOINT} cannot be reached ({_reason(error)})")


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
    offline = _is_offline()
    state = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} cannot be reached ({_reason(error)})"
    problem = f"is not in the cache ({constants.HF_HUB_CACHE}), and {state}"
    online = "unset HF_HUB_OFFLINE" if offline else "check the connection, HTTPS_PROXY and HF_ENDPOINT"
    return Fault("model.path", problem, f"{online}; {local}; or model=smollm2, which needs no network", name)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error
    return first_line(cause, 160)
