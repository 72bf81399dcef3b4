"""How the batches of a run are laid out for a model that computes attention by document."""

from __future__ import annotations

from typing import Any

from runner.config.schema import TrainSettings
from runner.data.batches import Batches


def laid(batches: Batches, model: Any, device_type: str, *, whole: bool) -> Batches:
    """The batches without padding; on a CPU, a prompt is computed once for all of its answers.

    ``whole``: each sequence has to be computed whole, see ``needs_whole``; so it has with longrope, whose frequencies
    depend on the length of the sequence.
    """
    has_long_rope = "longrope" in str(model.config.to_dict())
    answers = batches.rows.unit if batches.answers is None else batches.answers.per_row
    if whole or answers == 1 or device_type != "cpu" or has_long_rope:
        return batches.laid_end_to_end()
    return batches.sharing_prompts()


def needs_whole(settings: TrainSettings, *, is_eager: bool) -> bool:
    """Whether something beside attention depends on whole sequences.

    The noise of NEFTune depends on the length of its sequence, the load of experts is counted over all tokens, and
    compiled layers need packs of one shape.
    """
    return bool(settings.neftune_noise_alpha or settings.router_aux_loss_coef) or not is_eager
