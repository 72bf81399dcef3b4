"""``tracking.also=[tensorboard]``: an event file in the folder ``tensorboard`` of the run.

To look at it: ``tensorboard --logdir outputs``. The file is written again at each attempt of the run, from
metrics.jsonl: so it has each point once, whenever a process was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from runner.tracking.also.tracker import About
from runner.tracking.state_file import DONE, State

SUFFIX = ".runner"
"""The end of the names of our event files: other files in the folder are not touched."""


class TensorBoard:
    """The event file of a run. Needs the package tensorboard, and neither torch nor TensorFlow."""

    def __init__(self, about: About) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams import metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = about.rundir.tensorboard
        for path in folder.glob(f"*{SUFFIX}"):
            path.unlink()
        self._writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
        now = time.time()
        # A TensorBoard that is open forgets the points of the file before.
        self._write(now, 0, session_log=SessionLog(status=SessionLog.START))
        start = SessionStartInfo(group_name=about.identity, start_time_secs=now)
        for key, value in about.overrides.items():
            start.hparams[key].string_value = value
        self._write(now, 0, summary=_trial(metadata.SESSION_START_INFO_TAG, session_start_info=start))
        config = json.dumps(about.config, indent=2, ensure_ascii=False, default=str).splitlines()
        code = "\n".join(f"    {line}" for line in config)
        for name, text in {"name": about.name, "notes": about.notes, "config": code}.items():
            if text:
                self._write(now, 0, summary=_text(f"run/{name}", text))

    def log(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(time_s, step, summary=Summary(value=values))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, state: State | None) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo

        if state is not None:
            status = api_pb2.STATUS_SUCCESS if state.status in DONE else api_pb2.STATUS_FAILURE
            info = SessionEndInfo(status=status, end_time_secs=state.updated)
            trial = _trial(metadata.SESSION_END_INFO_TAG, session_end_info=info)
            self._write(state.updated, state.step, summary=trial)
            end = f"{state.status}: {state.reason}" if state.reason else state.status
            self._write(state.updated, state.step, summary=_text("run/end", end))
        self._writer.close()

    def _write(self, time_s: float, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time_s, step=step, **what))


def _trial(tag: str, **info: Any) -> Any:
    """What TensorBoard's page of hyperparameters knows of a run, as a summary. Its own functions need TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = metadata.create_summary_metadata(HParamsPluginData(**info))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _text(tag: str, text: str) -> Any:
    """A text as a summary; TensorBoard reads it as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
