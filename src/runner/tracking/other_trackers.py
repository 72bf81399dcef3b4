"""The trackers besides MLflow that ``tracking.also`` may name, and whether they can be used. Imports none of them.

A tracker of the user's is a function ``file.py:name`` that makes a ``Tracker`` from an ``About`` (``also.tracker``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from runner.config import user_function
from runner.config.bounds import Must
from runner.errors import Fault


def is_own(name: str) -> bool:
    """Whether it is a function of the user's."""
    return ":" in name


Name = Literal["tensorboard", "wandb", "trackio"] | Annotated[str, Must(is_own, "that is file.py:name")]
KEY = "tracking.also"


def faults(names: Iterable[str], code: Sequence[str] = ()) -> Iterator[Fault]:
    """Trackers that are not installed, that have no login, or functions that do not exist in the user's ``code``."""
    for name in names:
        if is_own(name):
            yield from user_function.faults("also", name, code, f"{KEY}=[lab.py:tracker]")
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb writes a folder of this name, which Python takes for a package
            remedy = f"install it: uv pip install {name}"
            yield Fault("also", f"needs the package {name}, which is not installed", remedy, name)
        elif name == "wandb" and not _is_logged_in():
            problem = "W&B is not logged in, and WANDB_API_KEY is not set"
            remedy = "run wandb login, or set WANDB_MODE=offline: wandb sync sends the files in the run folder later"
            yield Fault("also", problem, remedy, name)


def _is_logged_in() -> bool:
    """Whether W&B has a key, works offline, or has settings of the user that may contain both."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    home = Path.home()
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in (Path(os.environ.get("NETRC") or home / ".netrc"), home / "_netrc"):
        with contextlib.suppress(OSError):
            if host in path.read_text(errors="replace"):
                return True
    folders = (Path(os.environ.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb"), Path("wandb"))
    return any((folder / "settings").is_file() for folder in folders)
