"""What a run on a model that reads images may not combine, and what its plan says about images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runner.errors import Fault
from runner.models.kernels import compilation

if TYPE_CHECKING:
    from runner.data.tokenization import DataReport
    from runner.train.options import Options

ATTENTIONS = ("auto", "sdpa", "eager")


def faults(options: Options, name: str) -> Iterator[Fault]:
    """Options that are not proven, or have no effect, with a model that reads images; ``name``: that of the model.

    Packed rows are separated by a mask: attention by document is not proven for these models.
    """
    task, parallel = options.task, options.parallel
    if not task.images:
        problem = f"task={task.name} does not train models that read images, as {name} does"
        yield Fault("task", problem, "use task=sft, or a model for text", task.name)
    if parallel.kind == "fsdp":
        yield Fault("parallel", f"FSDP does not shard models that read images, as {name} does", "use ddp", "fsdp")
    if parallel.kind == "ddp" and options.trains_vision and not parallel.find_unused_parameters:
        problem = "is needed with lora.train_vision=true: a batch without images gives the vision tower no gradient"
        yield Fault("parallel.find_unused_parameters", problem, "set parallel.find_unused_parameters=true", False)
    if options.compile.func not in (compilation.auto, compilation.none):
        yield Fault("compile", f"is not proven for models that read images, as {name} does", "use compile=none")
    if options.model.attention not in ATTENTIONS:
        problem = f"is not proven for models that read images, as {name} does"
        yield Fault("model.attention", problem, f"use one of {', '.join(ATTENTIONS)}", options.model.attention)
    if not options.quant.plain and not options.quant.spares:
        problem = f"would also quantize the vision tower of {name}, which is not proven"
        yield Fault("quant", problem, "use quant=4bit, 8bit or none", options.quant.name)
    if options.begins_from_data:
        problem = "looks at rows without their images"
        yield Fault("lora.init_lora_weights", problem, "set it to true", "eva")
    if options.train.metrics:
        problem = "the model would answer prompts without their images"
        yield Fault("train.metrics", problem, "set it to [], and compare held-out losses", options.train.metrics)


def notes(options: Options, report: DataReport) -> list[tuple[str, str]]:
    """The lines of ``plan`` about images."""
    if not report.images:
        return [("images", "none: the rows are text alone")]
    vision = "trained" if options.trains_vision else "frozen"
    each = report.image_tokens / report.images
    text = f"{report.images}, {report.image_tokens} tokens stand for them ({each:.0f} each); vision tower {vision}"
    return [("images", text)]
