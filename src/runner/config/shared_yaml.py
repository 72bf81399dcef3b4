"""Write the YAML files of many runs: what their configurations have in common becomes text once."""

from __future__ import annotations

import functools
import marshal
from collections.abc import Mapping
from typing import Any

import yaml


def dump(tree: Mapping[str, Any], dumper: Any) -> str:
    """The tree as ``yaml.dump`` writes it in block style without sorting: the text of each value at the top.

    Of a tree with a single key: of each value below that key. Texts of equal values are made once. No aliases.
    """
    above, inner = None, tree
    if len(tree) == 1 and isinstance(only := next(iter(tree.values())), Mapping) and only:
        (above,), inner = tree, only
    if not inner:
        return _written(inner, dumper)
    texts = [_text(above, key, value, dumper) for key, value in inner.items()]
    return "".join(texts) if above is None else _written({above: {}}, dumper).replace(" {}", "") + "".join(texts)


def _text(above: Any, key: Any, value: Any, dumper: Any) -> str:
    try:
        # Version 2 has no references: equal trees have equal bytes, and 1, 1.0, true and "1" have different ones.
        return _shared(marshal.dumps((above, key, value), 2), dumper)
    except ValueError:  # a value of another type than those of JSON
        return _below(above, key, value, dumper)


@functools.lru_cache(maxsize=1024)
def _shared(packed: bytes, dumper: Any) -> str:
    above, key, value = marshal.loads(packed)
    return _below(above, key, value, dumper)


def _below(above: Any, key: Any, value: Any, dumper: Any) -> str:
    if above is None:
        return _written({key: value}, dumper)
    return _written({above: {key: value}}, dumper).partition("\n")[2]


def _written(tree: Any, dumper: Any) -> str:
    return str(yaml.dump(tree, Dumper=dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))
