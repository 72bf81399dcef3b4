"""Nothing secret is written down: tokens, passwords and the credentials of URIs are cut out of every text we keep."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 12
"""An environment variable shorter than this may stand in any text by chance: hiding it everywhere would maim texts."""


def redact(text: str) -> str:
    """The text without secrets: known kinds of tokens, credentials in URIs and headers, ``password=…``, and what the
    environment holds under a secret name (``HF_TOKEN``), unless that is a plain word, name or path."""
    return _redacted(text, _environment_secrets())


def redact_tree(tree: Any) -> Any:
    """The same nested dicts and lists, with every value under a secret name hidden and every text redacted."""
    return _redacted_tree(tree, _environment_secrets())


def find_secrets(tree: Any) -> list[str]:
    """The dotted keys whose value ``redact_tree`` would change: ``["tracking.uri", "names.0"]``."""
    return list(_differing(tree, redact_tree(tree), ""))


@functools.lru_cache(4096)
def names_secret(key: str) -> bool:
    """Whether a key by its name holds a secret: ``hf_token`` and ``api_key``, but not ``max_tokens`` or ``pad_token``.

    Only the last part of the key counts: ``password_file`` names a file, ``secret.path`` a path.
    """
    name = re.split(r"[./]", key)[-1].lower().replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and name not in _TOKENS_OF_TEXT


def take_credentials(uri: str) -> tuple[str, str | None, str | None]:
    """The URI without credentials, then user and password, each None where the URI has none."""
    scheme, found, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    credentials, at, host = authority.rpartition("@")
    if not found or not at:
        return uri, None, None
    user, colon, password = credentials.partition(":")
    return f"{scheme}://{host}{slash}{path}", unquote(user) or None, unquote(password) if colon else None


def put_credentials(uri: str, user: str | None, password: str | None) -> str:
    """The URI with user and password in it: what ``take_credentials`` took. A file's has nobody to tell them."""
    if not user or urlsplit(uri).username or not urlsplit(uri).netloc:
        return uri
    credentials = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    return uri.replace("://", f"://{credentials}@", 1)


def _differing(before: Any, after: Any, key: str) -> Iterator[str]:
    if isinstance(before, Mapping | list | tuple):
        below = before.items() if isinstance(before, Mapping) else enumerate(before)
        for name, value in below:
            yield from _differing(value, after[name], f"{key}.{name}" if key else str(name))
    elif before is not after and before != after:
        yield key


def _hide(value: Any) -> Any:
    # A flag (`token: true`), a number that only looks the part, or a reference to the environment is no secret.
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    if isinstance(value, Mapping):
        return redact_tree(value)
    if value is None or isinstance(value, bool) or value == "" or str(value).startswith("${"):
        return value
    return HIDDEN


def _without_value(found: re.Match[str]) -> str:
    key, between, value = found.groups()
    if not names_secret(key) or value.strip("\"'").lower() in ("", "null", "none", "true", "false", HIDDEN):
        return found[0]
    return found[0] if value.startswith("${") else f"{key}{between}{HIDDEN}"


def _redacted(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _IN_URI.sub(f"://{HIDDEN}@", text)
    text = _BEARER.sub(lambda found: f"{found[1]} {HIDDEN}", text)
    text = _TOKEN.sub(HIDDEN, text)
    return _ASSIGNMENT.sub(_without_value, text)


def _redacted_tree(tree: Any, secrets: list[str]) -> Any:
    if isinstance(tree, Mapping):
        return {k: _hide(v) if names_secret(str(k)) else _redacted_tree(v, secrets) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_redacted_tree(item, secrets) for item in tree]
    return _redacted(tree, secrets) if isinstance(tree, str) else tree


def _environment_secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if names_secret(name) and _is_unlikely(value)}
    return sorted(found, key=len, reverse=True)


def _is_unlikely(value: str) -> bool:
    """Whether a text that holds ``value`` can only have it from the secret: it is long, and not made of words."""
    return len(value) >= SHORTEST and not _PLAIN.fullmatch(value) and not os.path.exists(value)


_SECRET_NAME = re.compile(r"(?:^|_)(?:token|password|passwd|passphrase|secret|(?:api|access|secret|private)_?key)$")
_TOKENS_OF_TEXT = {
    f"{kind}_token"
    for kind in ("pad", "eos", "bos", "unk", "cls", "sep", "mask", "image", "audio", "video", "start", "end", "stop")
}
_IN_URI = re.compile(r"://(?:[^/\s@:'\"]*:[^/\s'\"]*|[^/\s@:'\"]{20,})@")
_WORD = r"(?:[A-Z]?[a-z]{1,15}|[A-Z]{1,15})\d{0,4}"
_PLAIN = re.compile(rf"[~./]*{_WORD}(?:[./_-]+(?:{_WORD}|\d{{1,4}}))*/?")
"""Words in a row, as in names and paths: ``postgres_dump``, ``/data/runs-2024``."""
_BEARER = re.compile(r"(\bbearer(?=\s+\S*\d)|authorization\W{1,4}basic)\s+[\w.~+/=-]{16,}", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-(?=[\w-]*\d)(?:[\w-]*[_-])?[A-Za-z0-9]{16,}[\w-]*|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)([\"']?\s*[=:]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;&'\"}\])]+)")
