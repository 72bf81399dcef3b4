"""Redact secrets: remove tokens, passwords and credentials in URIs from every text that is stored or printed."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
SHORTEST = 12
"""Characters. The values of shorter environment variables are not redacted: they may occur in a text by chance."""
MOST_KEPT = 200
"""Characters of the longest text whose result is kept: the runs of a sweep have most of their texts in common."""


def redact(text: str) -> str:
    """The text without secrets: known kinds of tokens, credentials in URIs and headers, ``password=…``, and the values
    of environment variables with a secret name (``HF_TOKEN``), unless the value is a plain word, name or path."""
    return _redacted(text, _environment_secrets())


def redact_all(texts: Iterable[str]) -> list[str]:
    """The texts without secrets."""
    secrets = _environment_secrets()
    return [_redacted(text, secrets) for text in texts]


def redact_tree(tree: Any) -> Any:
    """A copy of nested dicts and lists in which every value of a secret key is hidden and every text is redacted."""
    return _redacted_tree(tree, _environment_secrets())


def find_secrets(tree: Any) -> list[str]:
    """The dotted keys whose values ``redact_tree`` would change: ``["tracking.uri", "names.0"]``."""
    return list(_differing(tree, redact_tree(tree), ""))


@functools.lru_cache(4096)
def names_secret(key: str) -> bool:
    """Whether a key of this name contains a secret: ``hf_token``, ``apiKey`` and ``PGPASSWORD`` do, ``max_tokens`` and
    ``pad_token`` do not. Only the end of the key matters: ``password_file`` names a file, ``secret.path`` is a path.
    """
    name = _CAMEL.sub("_", re.split(r"[./]", key)[-1]).lower().replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET.search(name)


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
    # A flag (`token: true`), null, an empty text, an interpolation (`${oc.env:HF_TOKEN}`), and `***` are no secrets.
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    if isinstance(value, Mapping):
        return redact_tree(value)
    if value is None or isinstance(value, bool) or value == "" or _NOT_SECRET.match(str(value)):
        return value
    return HIDDEN


def _redacted(text: str, secrets: tuple[str, ...]) -> str:
    return _redacted_once(text, secrets) if len(text) <= MOST_KEPT else _redacted_now(text, secrets)


@functools.lru_cache(8192)
def _redacted_once(text: str, secrets: tuple[str, ...]) -> str:
    return _redacted_now(text, secrets)


def _redacted_now(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    text = _IN_URI.sub(f"://{HIDDEN}@", text)
    text = _TOKEN.sub(HIDDEN, text)
    text = _HEADER.sub(rf"\1{HIDDEN}", text)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    text = _LOGIN.sub(rf"\1{HIDDEN}", text)
    text = _without_values(text, _ELEMENT, _IN_ELEMENT)
    text = _without_values(text, _OPTION, _VALUE)
    return _without_values(text, _ASSIGNED, _VALUE)


def _without_values(text: str, keys: re.Pattern[str], values: re.Pattern[str]) -> str:
    """Hide the value that follows each match of ``keys`` whose group 1 is the name of a secret."""
    parts, position = [], 0
    for match in keys.finditer(text):
        if match.start() < position or not names_secret(match[1]):
            continue
        value = _value(text, match, values)
        if value and not _NO_VALUE.fullmatch(value):
            parts += [text[position : match.end()], HIDDEN]
            position = match.end() + len(value)
    return "".join(parts) + text[position:]


def _value(text: str, key: re.Match[str], values: re.Pattern[str]) -> str:
    """The value after a key: a quoted text, the rest of a quoted ``'key=value'`` or of a YAML line, or a word."""
    opening = text[key.start() - 1 : key.start()]
    if opening in ("'", '"') and opening not in key[0] and text[key.end() : key.end() + 1] not in ("'", '"', "\\"):
        is_block = text[key.end() : key.end() + 1] in ("|", ">")
        return re.split(opening if is_block else rf"\n|\\n|{opening}", text[key.end() :], maxsplit=1)[0]
    line = text[text.rfind("\n", 0, key.start()) + 1 : key.start()]
    of_line = _OF_YAML_LINE.match(text, key.end()) if not line.strip(" -") and ":" in key[0] else None
    match = of_line or values.match(text, key.end())
    return match[0] if match else ""


def _redacted_tree(tree: Any, secrets: tuple[str, ...]) -> Any:
    if isinstance(tree, Mapping):
        return {k: _hide(v) if names_secret(str(k)) else _redacted_tree(v, secrets) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        before = ["", *map(str, tree)]  # ["--token", "abc"]
        pairs = zip(before, tree, strict=False)
        return [
            _hide(item) if option.startswith("--") and names_secret(option) else _redacted_tree(item, secrets)
            for option, item in pairs
        ]
    return _redacted(tree, secrets) if isinstance(tree, str) else tree


def _environment_secrets() -> tuple[str, ...]:
    values = {value for name, value in os.environ.items() if names_secret(name) and _is_unlikely(value)}
    return tuple(sorted(values, key=len, reverse=True))


def _is_unlikely(value: str) -> bool:
    """Whether ``value`` cannot occur in a text by chance: it is long, not made of words, and no existing path."""
    return len(value) >= SHORTEST and not _PLAIN.fullmatch(value) and not os.path.exists(value)


_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_KEY_OF = (
    "api|app|access|secret|private|account|shared|encryption|signing|ssh|master|service|subscription|license|client|auth"
    "|storage|deploy|consumer|session|security|registration"
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:token|secret|credential|pass(?:phrase|code)|jwt|cookie|authorization|connection_string)$"
    r"|passw(?:or)?d$|_pwd$|(?:_|^ssh|^my|^db|^pg)pass$"
    r"|(?:api|auth|access|refresh|bearer|hf|oauth|session|bot|csrf|client)(?:token|secret)$"
    rf"|(?:^|_|x)(?:{_KEY_OF})_?key(?:_base)?$|(?:^|_)webhook(?:_ur[il])?$"
)
_NO_SECRET = re.compile(  # tokens of texts, and passes over data
    r"(?:^|_)(?:pad|eos|bos|unk|cls|sep|mask|image|audio|video|boi|eoi|start|end|stop|prefix|suffix|middle|special|added"
    r"|next|last|first|new|per|each|one|every|text|sub|any|begin|bad|forced|id)_?token$"
    r"|(?:^|_)(?:forward|backward|first|second|last|one|two|single|per|each|by|full)_pass$"
)
_NOT_SECRET = re.compile(rf"\$\{{|(?:https?://[^/\s@]+/)?{re.escape(HIDDEN)}$")
"""An interpolation, or a value that is hidden already."""
_NO_VALUE = re.compile(  # of a key with a secret name: nothing, a flag, a variable, a type, the scheme of a header
    rf"[\"'\\]*(?:|null|none|true|false|{re.escape(HIDDEN)}+|\$\{{.*|(?-i:\$[A-Z_][A-Z0-9_]+)|<[^>]*>|os\.(?:environ|getenv).*"
    r"|(?:str|int|bytes|bool|any|optional\[\w+\])(?:\s*\|\s*none)?(?:\s*=\s*none)?"
    r"|(?:basic|bearer|token|digest|negotiate|apikey)(?:\s+\*+)?)[\"'\\]*",
    re.IGNORECASE,
)
_WORD = r"(?:[A-Z]?[a-z]{1,15}|[A-Z]{1,15})\d{0,4}"
_PLAIN = re.compile(rf"[~./]*{_WORD}(?:[./_-]+(?:{_WORD}|\d{{1,4}}))*/?")
"""A sequence of words, as in names and paths: ``postgres_dump``, ``/data/runs-2024``."""

_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----[\s\S]*?(?:-----END [A-Z0-9 ]*-----|\Z)")
_IN_URI = re.compile(r"://(?:[^/\s@:'\"]*:[^/\s'\"]*|[^/\s@:'\"]*:(?!\d{1,5}(?:/|\s|$))[^\s@'\"]*|[^/\s@:'\"]{20,})@")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-(?=[\w-]*\d)(?:[\w-]*[_-])?[A-Za-z0-9]{16,}[\w-]*"
    r"|[srp]k_(?:live|test)_\w{10,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|gl(?:pat|dt|rt)-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|SG\.[\w-]{16,}\.[\w-]{16,}|dop_v1_\w{30,}|dapi[0-9a-f]{32}|gsk_[A-Za-z0-9]{20,}"
    r"|nvapi-[\w-]{20,}|r8_[A-Za-z0-9]{30,}|\d{8,10}:AA[\w-]{33}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|(?<=hooks\.slack\.com/services/)[\w/]{10,}|(?<=/api/webhooks/)\d+/[\w-]{20,}"
)
_HEADER = re.compile(
    r"(authorization[\"'\\]*\s*[=:]\s*[\"'\\]*(?:basic|bearer|token|digest|negotiate|apikey)\s+|\bbearer\s+(?=\S*\d\S*)"
    r"(?=[\w.~+/=-]{16,}))(?!\*)[^\s\"'\\,;]+",
    re.IGNORECASE,
)
"""Of a header the scheme stays."""
_IN_QUERY = re.compile(
    r"([?&](?:key|sig|signature|auth|code|x-amz-signature|x-amz-credential|x-goog-signature)=)[^\s&#'\"]{12,}",
    re.IGNORECASE,
)
_LOGIN = re.compile(
    r"(;\s*(?i:pwd)=|\blogin\s+\S+\s+password\s+|(?<!\S)(?:-u|--user)[ =]['\"]?[\w.@-]+:(?!\d+\b))[^\s'\";]+"
)
"""A connection string, a line of .netrc, and curl's option."""
_ELEMENT = re.compile(r"<([\w:.-]+)>")
_IN_ELEMENT = re.compile(r"[^<\n]+(?=</)")
_OPTION = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*+)(?:[\"']?,)?[ ]+(?!-)")
_ASSIGNED = re.compile(
    r"(?<![\w.+~-])[+~]{0,2}([\w.-]++)\\*[\"']?\s*(?:=>|:=|={1,2}|->|:|%3d|\\+u003d)[ \t]*", re.IGNORECASE
)
_MORE = r"[,;&)\]}'\"](?=\w)(?![\w.-]+[\"']?[=:])"
_VALUE = re.compile(
    r"""[brfuBRFU]{0,2}(?:\\*"(?:\\.|[^"\\\n]|"(?=\w))*(?:\\*"|$)|\\*'(?:\\.|[^'\\\n]|'(?=\w))*(?:\\*'|$)|["'][^\n]*)"""
    rf"|[|>][+-]?\d?(?:\n[ \t]+[^\n]*)+|(?:[^\s,;&'\"}})\]]|{_MORE})+"
)
"""A quoted text, a block of YAML, or a word: it ends before a delimiter, unless the delimiter is inside a word."""
_OF_YAML_LINE = re.compile(r"(?![\"'|>\[{$])[^\n]+?(?=\s+#|\s*(?:\n|$))")
