"""What the label of a row means: the names of classes, and the numbers that a model learns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from runner.data.training_keys import number
from runner.errors import DataError, Fault, quoted, suggest

Kind = Literal["single", "multi", "regression"]


def targets(kind: Kind, known: Sequence[str], label: Any) -> dict[str, float]:
    """The numbers of a row: ``target``, or with several classes one for each of ``known``.

    Raises:
        DataError: the label has another form, or is none of ``known``.
    """
    if kind == "regression":
        if (target := number(label)) is None:
            raise DataError(Fault("", f"the label {quoted(label)} is not a finite number", "correct the row"))
        return {"target": target}
    names = names_of(label, kind)
    if names is None:
        form = "a text or a whole number" if kind == "single" else "a list of texts or whole numbers"
        remedy = "correct the row, or choose task.kind=single, multi or regression"
        raise DataError(Fault("", f"the label {quoted(label)} is not {form}", remedy))
    if len(set(names)) < len(names):
        remedy = "write the name of each class once; a vector of 0 and 1 must be written as names"
        raise DataError(Fault("", f"the label {quoted(label)} has a class twice", remedy))
    if unknown := [name for name in names if name not in known]:
        near = suggest(unknown[0], known) or f"known: {', '.join(known[:8])}"
        remedy = "correct the row, leave it out, or name all classes with task.labels=[…]"
        raise DataError(Fault("", f"has the unknown label {quoted(unknown[0])}. {near}", remedy))
    if kind == "single":
        return {"target": float(known.index(names[0]))}
    return {f"target_{i}": float(name in names) for i, name in enumerate(known)}


def names_of(label: Any, kind: Kind) -> list[str] | None:
    """The names of the classes of a label; None if it has another form."""
    if kind == "multi":
        parts = [names_of(part, "single") for part in label] if isinstance(label, list) else [None]
        return None if None in parts else [name for part in parts for name in part or ()]
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas writes a column of whole numbers with gaps so
    if isinstance(label, bool):
        return [str(label).lower()]
    return [str(label)] if isinstance(label, int) or (isinstance(label, str) and label.strip()) else None


def refuse_alike(names: Iterable[str]) -> None:
    """Refuse classes of the data that differ in case or white space alone.

    Raises:
        DataError: naming two such classes.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(" ".join(name.split()).casefold(), name)
        if other != name:
            problem = f"the training rows have the labels {quoted(other)} and {quoted(name)}, which look like one class"
            raise DataError(
                Fault("task.labels", problem, "correct the rows; if they are two: name all with task.labels=[…]")
            )


def order(name: str) -> tuple[bool, int, str]:
    """Numbers by value, before texts."""
    is_number = re.fullmatch(r"-?\d{1,4000}", name) is not None
    return not is_number, int(name) if is_number else 0, name
