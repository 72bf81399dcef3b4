"""Redact secrets: remove tokens, passwords and credentials in URIs from every text that is stored or printed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 12
"""Characters. The values of shorter environment variables are not redacted: they may occur in a text by chance."""


def redact(text: str) -> str:
    """The text without secrets: known kinds of tokens, credentials in URIs and headers, ``password=…``, and the values
    of environment variables with a secret name (``HF_TOKEN``), unless the value is a plain word, name or path."""
    return _redacted(text, _environment_secrets())


def redact_tree(tree: Any) -> Any:
    """A copy of nested dicts and lists in which every value of a secret key is hidden and every text is redacted."""
    return _redacted_tree(tree, _environment_secrets())


def find_secrets(tree: Any) -> list[str]:
    """The dotted keys whose values ``redact_tree`` would change: ``["tracking.uri", "names.0"]``."""
    return list(_differing(tree, redact_tree(tree), ""))


@functools.lru_cache(4096)
def names_secret(key: str) -> bool:
    """Whether a key of this name contains a secret: ``hf_token`` and ``api_key`` do, ``max_tokens`` and ``pad_token``
    do not. Only the end of the key matters: ``password_file`` names a file, ``secret.path`` is a path.
    """
    name = re.split(r"[./]", key)[-1].lower().replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and name not in _TOKENS_OF_TEXT


def take_credentials(uri: str) -> tuple[str, str | None, str | None]:
    """Split a URI: (URI without credentials, user or None, password or None)."""
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    credentials, at, host = authority.rpartition("@")
    if not separator or not at:
        return uri, None, None
    user, colon, password = credentials.partition(":")
    return f"{scheme}://{host}{slash}{path}", unquote(user) or None, unquote(password) if colon else None


def put_credentials(uri: str, user: str | None, password: str | None) -> str:
    """The URI with user and password; the inverse of ``take_credentials``. Unchanged if it has no host (a file)."""
    if not user or urlsplit(uri).username or not urlsplit(uri).netloc:
        return uri
    credentials = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    return uri.replace("://", f"://{credentials}@", 1)


def _differing(before: Any, after: Any, key: str) -> Iterator[str]:
    if isinstance(before, Mapping | list | tuple):
        items = before.items() if isinstance(before, Mapping) else enumerate(before)
        for name, value in items:
            yield from _differing(value, after[name], f"{key}.{name}" if key else str(name))
    elif before is not after and before != after:
        yield key


def _hide(value: Any) -> Any:
    # A flag (`token: true`), null, an empty text, and an interpolation (`${oc.env:HF_TOKEN}`) are no secrets.
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    if isinstance(value, Mapping):
        return redact_tree(value)
    if value is None or isinstance(value, bool) or value == "" or str(value).startswith("${"):
        return value
    return HIDDEN


def _without_value(match: re.Match[str]) -> str:
    key, separator, value = match.groups()
    if not names_secret(key) or value.strip("\"'").lower() in ("", "null", "none", "true", "false", HIDDEN):
        return match[0]
    return match[0] if value.startswith("${") else f"{key}{separator}{HIDDEN}"


def _redacted(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _IN_URI.sub(f"://{HIDDEN}@", text)
    text = _BEARER.sub(lambda match: f"{match[1]} {HIDDEN}", text)
    text = _TOKEN.sub(HIDDEN, text)
    return _ASSIGNMENT.sub(_without_value, text)


def _redacted_tree(tree: Any, secrets: list[str]) -> Any:
    if isinstance(tree, Mapping):
        return {k: _hide(v) if names_secret(str(k)) else _redacted_tree(v, secrets) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redacted_tree(item, secrets) for item in tree]
    return _redacted(tree, secrets) if isinstance(tree, str) else tree


def _environment_secrets() -> list[str]:
    values = {value for name, value in os.environ.items() if names_secret(name) and _is_unlikely(value)}
    return sorted(values, key=len, reverse=True)


def _is_unlikely(value: str) -> bool:
    """Whether ``value`` cannot occur in a text by chance: it is long, not made of words, and no existing path."""
    return len(value) >= SHORTEST and not _PLAIN.fullmatch(value) and not os.path.exists(value)


_SECRET_NAME = re.compile(r"(?:^|_)(?:token|password|passwd|passphrase|secret|(?:api|access|secret|private)_?key)$")
_TOKENS_OF_TEXT = {
    f"{kind}_token"
    for kind in ("pad", "eos", "bos", "unk", "cls", "sep", "mask", "image", "audio", "video", "start", "end", "stop")
}
_IN_URI = re.compile(r"://(?:[^/\s@:'\"]*:[^/\s'\"]*|[^/\s@:'\"]{20,})@")
_WORD = r"(?:[A-Z]?[a-z]{1,15}|[A-Z]{1,15})\d{0,4}"
_PLAIN = re.compile(rf"[~./]*{_WORD}(?:[./_-]+(?:{_WORD}|\d{{1,4}}))*/?")
"""A sequence of words, as in names and paths: ``postgres_dump``, ``/data/runs-2024``."""
_BEARER = re.compile(r"(\bbearer(?=\s+\S*\d)|authorization\W{1,4}basic)\s+[\w.~+/=-]{16,}", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-(?=[\w-]*\d)(?:[\w-]*[_-])?[A-Za-z0-9]{16,}[\w-]*|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)([\"']?\s*[=:]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&'\"}\])]+)")
