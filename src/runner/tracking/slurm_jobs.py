"""Find the Slurm jobs of runs, by recorded job id or by the name of the submission."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import RunnerError
from runner.tracking import lookup
from runner.tracking.sweepdir import slurm_room

if TYPE_CHECKING:
    from runner.tracking.slurm_client import Job


class Queue:
    """Slurm's jobs for one status query. If Slurm does not answer: one warning, and no further calls."""

    def __init__(self) -> None:
        self._unrecorded: dict[Path, dict[str, str]] = {}

    def jobs(self, ids: Iterable[str]) -> dict[str, Job] | None:
        """Job id → job, for those ids that Slurm lists (empty ids are ignored); None if Slurm does not answer."""
        ids = sorted({*ids} - {""})
        if not ids:
            return {}
        if not self._answers:
            return None
        from runner.tracking import slurm_client

        try:
            return dict(slurm_client.jobs(ids))
        except RunnerError as error:
            self._is_silent(str(error))
            return None

    def unrecorded_jobs(self, home: Path) -> dict[str, str]:
        """Run folder → job id, for submissions below ``home`` whose submitter died before it recorded the id."""
        if home not in self._unrecorded:
            self._unrecorded[home] = dict(self._find_unrecorded(home))
        return self._unrecorded[home]

    def _find_unrecorded(self, home: Path) -> Iterable[tuple[str, str]]:
        for file in slurm_room(home).glob("runner-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged or removed
                submission = json.loads(file.read_text())
                if submission["job_id"] or submission["cluster"] != "slurm" or not self._answers:
                    continue
                from runner.tracking import slurm_client

                folders = submission["folders"]
                try:
                    array_ids = slurm_client.named(submission["name"])
                except RunnerError as error:
                    self._is_silent(str(error))
                    return
                for id in array_ids[:1]:
                    ids = [f"{id}_{number}" for number in range(len(folders))] if len(folders) > 1 else [id]
                    yield from zip(folders, ids, strict=True)

    @functools.cached_property
    def _answers(self) -> bool:
        from runner.tracking import slurm_client

        if problem := slurm_client.silence():
            self._is_silent(problem)
        return not problem

    def _is_silent(self, problem: str) -> None:
        """Warn, and stop calling Slurm: a controller that answers a ping may still not answer squeue."""
        self._answers = False
        lookup.log.warning(f"Slurm does not answer, so the states of its jobs are missing: {problem}")
