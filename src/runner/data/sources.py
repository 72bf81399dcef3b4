"""Sources of rows, the options of the group ``data``: bundled conversations, local files, the Hugging Face Hub.

Each option returns a ``Source``. Rows are read lazily: after a cache hit only the digest is computed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from runner.config.schema import Count, Text
from runner.data import data_files, hub_rows, readers
from runner.data.readers import Documents, Place, Row
from runner.errors import DataError, Fault


@dataclass(frozen=True)
class Records:
    """The rows of one split with their positions; each iteration reads them anew where they can be read in parts."""

    read: Callable[[], Iterable[tuple[Place, Row]]]

    def __iter__(self) -> Iterator[tuple[Place, Row]]:
        return iter(self.read())


@dataclass(frozen=True)
class Source:
    """The rows of a dataset, with the name and hash that identify it."""

    name: str
    train: Records
    eval: Records | None
    digest: str
    """SHA-256 of the content, first 32 hexadecimal digits: MLflow accepts at most 36."""
    uri: str
    """The source shown in MLflow's dataset lineage."""
    revision: str | None = None
    """Commit hash of a Hub dataset."""
    is_streamed: bool = False
    """Whether each pass reads the rows from the Hub, in the order of its files, see ``streaming``."""


def chitchat_pairs(*, rejected: Literal["answer", "opening"] = "answer") -> Source:
    """Preference pairs from chitchat-dataset: the true second answer, and a message of another conversation.

    ``rejected``: its second answer, or the message that opens it.
    Rows: ``{"prompt": [three messages], "chosen": [one], "rejected": [one]}``; conversations that are shorter are left
    out.
    """
    source, message = chitchat(), {"answer": 3, "opening": 0}[rejected]
    digest = source.digest if rejected == "answer" else f"{source.digest[:24]}-{rejected}"
    rows = Records(functools.partial(_pairs, source.train, message))
    return replace(source, name="chitchat_pairs", train=rows, digest=digest)


def chitchat_prompts() -> Source:
    """The first messages of chitchat-dataset, as prompts for answers that the model writes: ``{"prompt": text}``."""
    source = chitchat()
    return replace(source, name="chitchat_prompts", train=Records(functools.partial(_prompts, source.train)))


def chitchat_classes(*, classes: Count, messages: Count | None = None, cue: Text | None = None) -> Source:
    """Conversations of chitchat-dataset with the question that each was to be about, of the ``classes`` most frequent.

    ``messages``: only the first ones of each conversation; None: all. ``cue``: a line after those of a conversation, at
    whose end the model scores it; None: the messages, rendered by the chat template.
    Rows: ``{"messages": [{"role", "content"}, …], "label": question}``, with a cue ``{"text", "label"}``.
    """
    source = chitchat()
    rows = Records(functools.partial(_topics, _chitchat_file(), classes, messages, cue))
    digest = f"{source.digest[:24]}-{classes}-{messages}"
    digest += f"-{hashlib.sha256(cue.encode()).hexdigest()[:8]}" if cue is not None else ""
    return replace(source, name="chitchat_classes", train=rows, digest=digest)


def chitchat() -> Source:
    """Conversations between people, from the installed package chitchat-dataset: works offline, needs no account.

    The first speaker gets the role user, the second the role assistant.
    Rows: ``{"messages": [{"role", "content"}, …]}``.
    """
    file = _chitchat_file()
    version = importlib.metadata.version("chitchat-dataset")
    return Source(
        name="chitchat",
        train=_parsed_once(functools.partial(_conversations, file)),
        eval=None,
        digest=data_files.digest([file], "chitchat"),
        uri=f"package:chitchat-dataset=={version}",
    )


def local(*, path: Text, eval_path: Text | None, documents: Documents) -> Source:
    """A json, jsonl, csv, tsv, parquet or txt file, or a folder or glob of such files; types may be mixed.

    A json file contains a list of rows, ``{"data": [rows]}`` or one row. A txt file gives rows ``{"text": …}``: one
    per file, or one per paragraph (``documents``).

    Raises:
        DataError: with the file name, and the line if known.
    """
    train = data_files.find_files("data.path", path)
    held_out = data_files.find_files("data.eval_path", eval_path) if eval_path is not None else []
    digests = [data_files.digest(files, documents) for files in (train, held_out)]
    return Source(
        name=Path(path).stem,
        train=_file_rows(train, documents),
        eval=_file_rows(held_out, documents) if held_out else None,
        digest=hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32],
        uri=Path(path).expanduser().absolute().as_uri(),
    )


def check_local(*, path: str, eval_path: str | None, documents: str) -> Iterator[Fault]:
    """Check that the files exist and have a supported type, and that ``documents`` has an effect."""
    files: list[Path] = []
    faults: list[Fault] = []
    for key, value in (("path", path), ("eval_path", eval_path)):
        try:
            files += data_files.find_files(key, value) if value is not None else []
        except DataError as error:
            faults += error.faults
    yield from faults
    if documents != "file" and not faults and not any(file.suffix.lower() == ".txt" for file in files):
        yield Fault("documents", "has no effect: there is no txt file", "set data.documents=file", documents)


def hub(
    *,
    path: Text,
    name: Text | None,
    split: Text,
    eval_split: Text | None,
    revision: Text | None,
    streaming: bool = False,
) -> Source:
    """A dataset of the Hugging Face Hub, or a local folder in the Hub's layout.

    ``streaming``: nothing is read before the rows are needed, and then no more of the files than these.

    Raises:
        DataError: the Hub cannot be reached (detected within seconds), or the dataset is gated or does not exist.
    """
    commit = revision if hub_rows.is_offline() or os.path.exists(path) else hub_rows.find_commit(path, revision)
    splits = [split, *([eval_split] if eval_split else [])]
    if streaming:
        marks = [path, commit or "", name or "", *splits, "streaming"]
        records = [Records(functools.partial(hub_rows.streamed, path, name, each, commit)) for each in splits]
    else:
        loaded = [hub_rows.load_split(path, name, each, commit) for each in splits]
        marks = [path, commit or "", loaded[0]._fingerprint, loaded[1]._fingerprint if eval_split else ""]
        records = [
            Records(functools.partial(hub_rows.rows_of, found, path, each))
            for found, each in zip(loaded, splits, strict=True)
        ]
    return Source(
        name=path.rstrip("/").rpartition("/")[2],
        train=records[0],
        eval=records[1] if eval_split else None,
        digest=hashlib.sha256("\n".join(marks).encode()).hexdigest()[:32],
        uri=Path(path).resolve().as_uri() if os.path.exists(path) else f"hf://datasets/{path}@{commit or 'main'}",
        revision=commit,
        is_streamed=streaming,
    )


def check_hub(
    *, path: str, split: str, eval_split: str | None, revision: str | None, streaming: bool = False, **_: object
) -> Iterator[Fault]:
    for key, value in (("revision", revision), ("streaming", streaming or None)):
        if value is not None and os.path.exists(path):
            problem = "applies to Hub datasets only, and data.path is a local folder"
            yield Fault(key, problem, f"set data.{key}={'null' if key == 'revision' else 'false'}", value)
    for key, value in (("split", split), ("eval_split", eval_split)):
        if streaming and {*"[+"} & {*(value or "")}:
            problem = "is not one whole split, and data.streaming=true reads from the first row of a split on"
            yield Fault(key, problem, "name one split; data.train_rows and data.eval_rows limit its rows", value)


def _file_rows(files: list[Path], documents: Documents) -> Records:
    read = functools.partial(readers.read, files, documents)
    return _parsed_once(read) if all(file.suffix.lower() == ".json" for file in files) else Records(read)


def _parsed_once(read: Callable[[], Iterable[tuple[Place, Row]]]) -> Records:
    """Rows of a JSON text, which cannot be read in parts: they stay in memory for all passes over the source."""
    return Records(functools.cache(lambda: list(read())))


def _chitchat_file() -> Path:
    spec = importlib.util.find_spec("chitchat_dataset")  # does not import it
    if spec is None or spec.origin is None:
        raise DataError(Fault("data", "the package chitchat-dataset is not installed", "run: uv sync", "chitchat"))
    return Path(spec.origin).with_name("dataset.json")


def _conversations(file: Path) -> Iterator[tuple[Place, Row]]:
    for number, conversation in enumerate(json.loads(file.read_bytes()).values(), start=1):
        turns: list[tuple[str, str]] = []  # (sender, text), neighbours of one sender joined
        for sender, text in ((part["sender"], part["text"].strip()) for t in conversation["messages"] for part in t):
            if turns and turns[-1][0] == sender:
                turns[-1] = (sender, f"{turns[-1][1]} {text}".strip())
            elif text:
                turns.append((sender, text))
        turns = turns[: len(turns) // 2 * 2]  # drop a last turn without an answer
        if turns:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": text} for i, (_, text) in enumerate(turns)]
            yield Place(file.name, number, "row"), {"messages": messages}


def _prompts(conversations: Records) -> Iterator[tuple[Place, Row]]:
    for place, row in conversations:
        yield place, {"prompt": row["messages"][0]["content"]}


def _topics(file: Path, classes: int, messages: int | None, cue: str | None) -> Iterator[tuple[Place, Row]]:
    topics = [conversation.get("prompt") for conversation in json.loads(file.read_bytes()).values()]
    kept = {topic for topic, _ in Counter(filter(None, topics)).most_common(classes)}
    for place, row in _conversations(file):
        if (topic := topics[place.number - 1]) in kept:
            said = row["messages"][:messages]
            text = "\n".join([*(message["content"] for message in said), cue or ""])
            yield place, {**({"messages": said} if cue is None else {"text": text}), "label": topic}


def _pairs(conversations: Records, message: int) -> Iterator[tuple[Place, Row]]:
    longer = [(place, row["messages"]) for place, row in conversations if len(row["messages"]) >= 4]
    for number, (place, messages) in enumerate(longer):
        _, other = longer[(number + len(longer) // 2) % len(longer)]
        if messages[3]["content"] != other[message]["content"]:
            rejected = {**other[message], "role": "assistant"}
            yield place, {"prompt": messages[:3], "chosen": messages[3:4], "rejected": [rejected]}
