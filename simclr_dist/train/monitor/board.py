"""Write TensorBoard's dashboard of a run: layout, histograms, file."""

import io
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]  # made without types
from torch import Tensor
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram_raw

from simclr_dist.method.loss.tiles import unit_rows
from simclr_dist.system.files import append

SAMPLE = 256  # images of rank 0 whose cosines the histograms show
_BINS = 64

# Tags are regular expressions that TensorBoard matches from a tag's beginning. Charts without tags in a run stay empty.
LAYOUT: dict[str, dict[str, tuple[str, list[str]]]] = {
    "learning": {
        "loss, and its level by chance: log(2N - 1)": ("Multiline", ["loss/(nt_xent|dcl)$", "loss/chance$"]),
        "similarity of partners and of others": ("Multiline", ["similarity/(positive|negative)$"]),
        "partner among the nearest 1 and 5 of the batch": ("Multiline", ["retrieval/"]),
        "accuracy of the representation, % (probe, evaluation job)": ("Multiline", ["probe/", "eval/"]),
    },
    "embedding": {
        "alignment: distance of partners": ("Multiline", ["embedding/alignment$"]),
        "uniformity: 0 is collapse": ("Multiline", ["embedding/uniformity$"]),
        "effective rank: 1 is collapse": ("Multiline", ["embedding/effective_rank$"]),
    },
    "optimizer": {
        "learning rate": ("Multiline", ["optim/learning_rate$"]),
        "trust ratios of LARS": ("Multiline", ["lars/trust_ratio_"]),
        "gradient norm": ("Multiline", ["optim/gradient_norm$"]),
        "share of steps clipped": ("Multiline", ["optim/clipped_share$"]),
        "skipped steps, and most in a row": ("Multiline", ["optim/(skipped_steps|longest_skip)$"]),
    },
    "speed": {
        "images/s, between slowest and fastest rank": (
            "Margin",
            ["speed/images_per_second", "ranks/images_per_second_min", "ranks/images_per_second_max"],
        ),
        "own work a step, ms: slowest rank, and the others": ("Multiline", ["ranks/own_ms"]),
        "waiting for data, %: rank 0, and the worst": ("Multiline", ["(speed|ranks)/data_wait_percent"]),
        "peak memory, GiB: rank 0, and the most": ("Multiline", ["(speed|ranks)/memory_gib"]),
        "seconds a checkpoint": ("Multiline", ["run/checkpoint_seconds$"]),
        "restarts": ("Multiline", ["run/restarts$"]),
    },
}

# TensorBoard has a colour for a run, that is for a folder: the second curve of a chart would look like the first.
SECOND = frozenset(
    {
        "loss/chance", "similarity/negative", "retrieval/top5", "lars/trust_ratio_min", "lars/trust_ratio_max",
        "optim/longest_skip", "ranks/own_ms_others", "ranks/data_wait_percent_max", "ranks/memory_gib_max",
    }
)  # fmt: skip


def layout() -> Any:
    """Lay out TensorBoard's tab "Custom scalars", as a summary."""
    return custom_scalars({room: {title: list(chart) for title, chart in charts.items()} for room, charts in LAYOUT.items()})


def cosines(z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cosines of partners and of other images. [n] and [n * (n - 1)], from the first 256 rows of [n, d] views."""
    a, b = (unit_rows(z[:SAMPLE].float()) for z in (z_a, z_b))
    matrix = a @ b.T
    return matrix.diagonal(), matrix[~torch.eye(len(a), dtype=torch.bool, device=a.device)]


def cosine_histogram(name: str, values: Tensor) -> Any:
    """Summarise cosines in bins of equal width from -1 to 1. Values that are not finite are left out."""
    values = values[values.isfinite()].double().cpu()
    counts = torch.histc(values, _BINS, -1 - 1e-6, 1 + 1e-6)
    limits = torch.linspace(-1, 1, _BINS + 1)[1:]
    least, most = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    sums = float(values.sum()), float(values.square().sum())
    return histogram_raw(name, least, most, len(values), *sums, limits.tolist(), counts.tolist())


class EventFile:
    """TensorBoard's file of this start. Events of earlier starts from `purge_step` on are cut off before its first.

    TensorBoard's default loader keeps them otherwise: it obeys no session's start.

    Written at once and in this thread. SummaryWriter ends for good, with a traceback, when the disk is full for a moment.
    A kill takes what waits in its queue.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self._purge_step = purge_step
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._opening = [
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)),
        ]

    def add(self, summaries: Iterable[Any], step: int) -> None:
        """Write all of the summaries or none. Raises OSError when the disk does not take them."""
        for earlier in self.path.parent.glob("events.out.tfevents.*") if self._opening else ():
            if earlier != self.path:
                _cut(earlier, self._purge_step)
        records = io.BytesIO()
        for event in [*self._opening, *(Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries)]:
            RecordWriter(records).write(event.SerializeToString())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, records.getvalue())
        self._opening = []


def _cut(path: Path, step: int) -> None:
    """Cut an event file before the first event of `step` or later."""
    with path.open("r+b") as file, suppress(DecodeError):  # what follows a damaged event is not shown either
        end, at = file.seek(0, os.SEEK_END), 0
        while at < end:  # a record: its length in 8 bytes, a checksum, the event, a checksum
            file.seek(at)
            length = int.from_bytes(file.read(12)[:8], "little")
            if Event.FromString(file.read(min(length, end))).step >= step:
                file.truncate(at)
                break
            at += length + 16
