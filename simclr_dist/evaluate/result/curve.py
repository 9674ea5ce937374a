"""Accuracy by step, in a folder of its own below the run's TensorBoard."""

import io
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import scalar

from simclr_dist.evaluate.result.report import TRAINED, Result
from simclr_dist.system.files import append


class Curve:
    """The trained encoders' top-1 accuracy in percent, for each protocol as `eval/PROTOCOL_top1`.

    The folder is not the training's: TensorBoard without its fast loader leaves a file for good when its folder has a newer
    one. A file holds ascending steps; a point that is not beyond the last, and the first after a start, opens a new file with
    the whole curve, which takes the place of what is in older ones. So no step is shown twice, nor dropped as out of order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Path | None = None
        self._points: dict[int, list[Event]] = {}
        self._written: set[int] = set()

    def add(self, result: Result, when: float) -> None:
        """Show `result`, of `when` (seconds since 1970); OSError when the disk does not take it: the next call tries again."""
        step, protocols = int(result["encoder"]["step"]), result["protocols"].items()
        self._points[step] = [
            Event(wall_time=when, step=step, summary=scalar(f"eval/{protocol}_top1", part["results"][TRAINED]["top1"]))
            for protocol, part in protocols
        ]
        missing = {step} | self._points.keys() - self._written
        if self._file is None or min(missing) <= max(self._written, default=-1):
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._file, self._written, missing = self._folder / name, set(), set(self._points)
        opening = [
            Event(wall_time=when, file_version="brain.Event:2"),
            Event(wall_time=when, step=0, session_log=SessionLog(status=SessionLog.START)),  # what was shown before is void
        ]
        events = [event for number in sorted(missing) for event in self._points[number]]
        records = io.BytesIO()
        for event in events if self._written else opening + events:
            RecordWriter(records).write(event.SerializeToString())
        self._folder.mkdir(parents=True, exist_ok=True)
        append(self._file, records.getvalue())
        self._written |= missing
