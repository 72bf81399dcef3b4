"""The verb ``export``: write a trained model as a PEFT adapter, a whole model or a GGUF file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from runner import terminal
from runner.cli.args import MODEL_PATH, RUN, Args, Option, Verb, trained_run
from runner.errors import ConfigError, Fault
from runner.files import user_path, written_aside
from runner.models import averaging, gguf_export, hub, loftq_base
from runner.report import model_card
from runner.tracking import lookup, naming, origin
from runner.tracking.mlflow import pyfunc_model
from runner.tracking.rundir import RunDir
from runner.train import merge, trained_model
from runner.train.trained_model import Trained

if TYPE_CHECKING:
    from runner.train.merge import Check

Dtype = Literal["float32", "bfloat16", "float16"]

VERB = Verb(
    "export RUN [DIR]",
    f"""Writes the model of a run, with its tokenizer and a model card, so that other programs can load it.

  python -m runner export first                     the adapter, for plain PEFT, in outputs/exports/first
  python -m runner export first my/model --merged   the whole model, for plain transformers (vLLM, TGI, …)
  python -m runner export first --gguf              the whole model as one file, for llama.cpp
  python -m runner export first --push me/first     and uploads the folder to the Hugging Face Hub
  python -m runner export first --average second,third   the mean of the weights of these runs

{RUN};
DIR a folder that does not exist or is empty.""",
    Option(
        "--merged",
        "add the adapter to the base weights in full precision, also if the run was trained on 4 or 8 bits; the "
        "logits are compared with those of base and adapter on rows of the run, and may differ by 1e-4 at most "
        "(by 1e-5 of the largest logit, if the model is too large to be computed in float64)",
    ),
    Option("--gguf", "converted by llama.cpp's convert_hf_to_gguf.py, which must be on the PATH"),
    Option(
        "--push OWNER/NAME", "then upload the folder to this model repository of the Hub, which is created if missing"
    ),
    Option("--average RUN,RUN", "the mean of the weights of RUN and these runs, of the same base model and options"),
    Option("--private", "of --push: a new repository is private"),
    Option("--dtype DTYPE", "dtype of a whole model; default: as the base model, for GGUF 16 bits", Dtype),
    MODEL_PATH,
)


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, a run without a model, a folder that is not empty, no converter, an option without effect.
        TrainingError: merging changed the logits of the model.
    """
    args = VERB.read(argv)
    run, rest = trained_run(VERB, args)
    run.rundir.read_state()  # the model card needs it: a damaged file is reported before the work
    order = _order(args, run, rest)
    if not args["--average"]:
        return _export(run, order, args, run.rundir.path)
    others = [lookup.resolve_run(name, args.outputs_dir) for name in args["--average"].split(",") if name]
    with _averaged(run, others) as (averaged, about):
        return _export(averaged, order, args, run.rundir.path, {"average": about})


def _export(run: Trained, order: _Order, args: Args, source: Path, about: dict[str, str] | None = None) -> int:
    base = run.base.path if run.is_adapter else str((run.rundir.read_manifest().get("model") or {}).get("path", ""))
    trained_model.quiet()
    with written_or_refused(order.folder) as aside:
        check = _write(run, order, aside)
        if "model" in order.kinds:
            origin.note(aside, source)
        notes = {**(about or {}), **(check.notes() if check else {})}
        (aside / "README.md").write_text(
            model_card.text(
                run.rundir,
                order.kinds,
                base,
                notes,
                is_chat=run.is_chat,
                head=run.options.task.head,
                reads_images=run.reads_images,
            )
        )
    for name, note in notes.items():
        terminal.print_line(f"{name:<8} {note}")
    files = sorted(order.folder.iterdir())
    size = sum(path.stat().st_size for path in files)
    terminal.print_line(
        f"export   {terminal.nearest(order.folder)}  ({', '.join(order.kinds)}, {size / 2**20:.1f} MiB)"
    )
    terminal.print_line(f"load     see {terminal.nearest(order.folder / 'README.md')}")
    if args["--push"]:
        if order.kinds[0] == "adapter" and os.path.isabs(base):
            terminal.print_line("note     adapter_config.json names the base model by a folder of this machine")
        url = hub.push(order.folder, "--push", args["--push"], private=args["--private"], left_out=[origin.EXPORTED])
        terminal.print_line(f"upload   {url}")
    return 0


@contextmanager
def _averaged(run: Trained, others: Sequence[RunDir]) -> Iterator[tuple[Trained, str]]:
    """(the run with the mean of its weights and those of the others, in words); in a temporary folder.

    Raises:
        ConfigError: a run without a model, a run that is named twice, or models that cannot be averaged.
    """
    rundirs = [run.rundir, *others]
    if len({rundir.path.resolve() for rundir in rundirs}) < len(rundirs):
        raise ConfigError(Fault("--average", "names a run twice", "name other runs than RUN, each once"))
    for rundir in others:
        trained_model.refuse_without_model(rundir)
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:
        copied = RunDir(Path(folder, run.rundir.path.name))
        copied.path.mkdir()
        for path in run.rundir.path.iterdir():
            if path != run.rundir.model:
                (copied.path / path.name).symlink_to(path.absolute())
        what = averaging.average([rundir.model for rundir in rundirs], copied.model)
        names = ", ".join(naming.label(rundir.read_manifest(), rundir.path) for rundir in rundirs)
        yield replace(run, rundir=copied), f"{what}: {names}"


@dataclass(frozen=True)
class _Order:
    """The kinds of files to write, and the folder for them."""

    folder: Path
    kinds: tuple[model_card.Kind, ...]
    dtype: Dtype | None
    converter: list[str]


def _order(args: Args, run: Trained, rest: list[str]) -> _Order:
    faults: list[Fault] = []
    if len(rest) > 1:
        faults += VERB.misused("takes one folder", " ".join(rest)).faults
    if args["--merged"] and not run.is_adapter:
        faults.append(Fault("--merged", "has no effect: this run trained all weights", "leave it out"))
    whole = args["--merged"] or not run.is_adapter
    if args["--dtype"] and not (whole or args["--gguf"]):
        remedy = "add --merged, or leave it out: an adapter keeps its dtype"
        faults.append(Fault("--dtype", "has no effect on an adapter", remedy, args["--dtype"]))
    if (times := loftq_base.iterations_of(run.rundir.model)) > 1 and not whole and not args["--gguf"]:
        problem = f"{times} iterations of LoftQ quantized the base of this adapter anew, so it fits no published model"
        faults.append(Fault("export", problem, "add --merged"))
    if args["--gguf"] and run.scores:
        problem = "llama.cpp has no score heads, and the model of this run has one"
        faults.append(Fault("--gguf", problem, "leave it out; --merged writes the whole model"))
    if args["--gguf"] and run.reads_images:
        problem = "llama.cpp has what reads images in a file of its own, which is not written here"
        faults.append(Fault("--gguf", problem, "leave it out; --merged writes the whole model"))
    gguf_only = args["--gguf"] and not args["--merged"]
    kinds: list[model_card.Kind] = [] if gguf_only else ["model" if whole else "adapter"]
    kinds += ["gguf"] if args["--gguf"] else []
    command: list[str] = []
    if args["--gguf"] and not run.scores and not run.reads_images:
        try:
            command = gguf_export.find()
        except ConfigError as error:
            faults += error.faults
    average = "-average" if args["--average"] else ""
    folder = user_path(rest[0]) if rest else args.outputs_dir / "exports" / f"{default_name(run, kinds)}{average}"
    faults += _folder_faults(folder.absolute())
    if args["--private"] and not args["--push"]:
        faults.append(Fault("--private", "has no effect without --push", "leave it out, or add --push OWNER/NAME"))
    if args["--push"] and not faults:
        faults += hub.push_faults("--push", args["--push"])
    if faults:
        raise ConfigError(*faults)
    return _Order(folder.absolute(), tuple(kinds), args["--dtype"], command)


def default_name(run: Trained, kinds: list[model_card.Kind]) -> str:
    """A folder name from the name of the run, with the suffix -merged or -gguf for such a model."""
    manifest = run.rundir.read_manifest()
    name = str(manifest.get("name") or run.rundir.path.name)
    if label := manifest.get("label"):
        name = f"{manifest['sweep']}-{label}" if manifest.get("sweep") else str(label)
    plain = re.sub(r"[^\w.,=+-]+", "-", name).strip("-.") or run.rundir.path.name
    kind = "gguf" if kinds == ["gguf"] else "merged" if run.is_adapter and kinds[0] == "model" else ""
    return f"{plain[:100]}-{kind}" if kind else plain[:100]


def _folder_faults(folder: Path) -> Iterator[Fault]:
    if folder.is_file():
        yield Fault("DIR", "is a file", "give a folder that does not exist or is empty", folder)
    elif _has_files(folder):
        yield Fault("DIR", "is not empty", "give another folder; existing files are never overwritten", folder)


@contextmanager
def written_or_refused(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to ``folder`` at the end; after an error nothing remains."""
    new_parents = [path for path in folder.parents if not path.exists()]
    try:
        with written_aside(folder) as aside:
            yield aside
            if _has_files(folder):
                raise ConfigError(Fault("DIR", "is not empty any more", "give another folder", folder))
    except BaseException as error:
        for path in new_parents:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(Fault("DIR", f"cannot be written: {error}", "give another folder", folder)) from error
        raise


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _write(run: Trained, order: _Order, aside: Path) -> Check | None:
    """Write everything but the model card; returns the check of a merged model."""
    if order.kinds == ("adapter",):
        _copy(run, aside)
        return None
    keeps_model = "model" in order.kinds
    with nullcontext(aside) if keeps_model else tempfile.TemporaryDirectory(dir=aside, prefix=".model-") as folder:
        check = merge.write(run, Path(folder), order.dtype)
        if "gguf" in order.kinds:
            gguf_export.convert(order.converter, Path(folder), aside / f"{order.folder.name}.gguf", order.dtype)
    return check


def _copy(run: Trained, aside: Path) -> None:
    for path in sorted(run.rundir.model.iterdir()):
        if path.is_file() and path.name not in ("README.md", *pyfunc_model.FILES):
            shutil.copy2(path, aside / path.name)
