"""``model.chat_template=FILE``: a chat template of the user's; its text becomes a part of the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.errors import Fault

KEY = "model.chat_template"
REMEDY = "name a file with a Jinja chat template (chat_template.jinja of a model folder)"
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""A tag of transformers' own."""


def settle(cfg: dict[str, Any]) -> Iterator[Fault]:
    """Replace the path of a template by its text; yields why that is not possible."""
    node = cfg.get("model")
    if not isinstance(node, Mapping) or not str(node.get("_target_")).startswith("runner."):
        return
    value = node.get("chat_template")
    if not isinstance(value, str) or not value.strip():
        return
    text = value if _is_template(value) else _read(value)
    if text is None:
        yield Fault(KEY, "is no readable text file", REMEDY, value)
    elif not _is_template(text):
        yield Fault(KEY, "is no template: it contains neither {{ … }} nor {% … %}", REMEDY, value)
    elif problem := _syntax_error(text):
        yield Fault(KEY, problem, "correct the file", value)
    else:
        cfg["model"]["chat_template"] = text


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _read(path: str) -> str | None:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError):
        return None


def _syntax_error(text: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", text))
    except TemplateSyntaxError as error:
        return f"is not valid Jinja: {error.message} (line {error.lineno})"
    return ""
