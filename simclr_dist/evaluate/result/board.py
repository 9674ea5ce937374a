"""Show an evaluation in the run's TensorBoard. It shows the curve so far, and features in the projector, with thumbnails."""

import hashlib
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

import numpy as np
from google.protobuf import text_format  # type: ignore[import-untyped]  # without types
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]  # made without types
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import RecordWriter
from torch.utils.tensorboard.summary import scalar, text

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.views.crops import eval_view, picture
from simclr_dist.evaluate.features.extraction import Images
from simclr_dist.evaluate.result.curves import comparable, curves
from simclr_dist.evaluate.result.file import TRAINED, Result
from simclr_dist.evaluate.result.report import Say
from simclr_dist.system.errors import reason_of
from simclr_dist.system.files import append, lock, write_atomically

POINTS = 1000  # of the projector: its sprite stays below the browsers' 8192 pixels, and t-SNE below a minute
SEED = 0
_THUMBNAIL = 32


class Curves:
    """The curves of the trained encoders' top-1 in percent, `eval/PROTOCOL_top1`. Each has a folder, by `curves.curves`.

    One folder would mix settings: TensorBoard's default loader keeps what an older file has at steps before the newer's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._curves: dict[str, _Curve] = {}

    def add(self, result: Result, when: float) -> None:
        """Show `result`, written at `when` (since 1970). OSError when the disk refuses it: the next call tries again."""
        for protocol, values in curves(result).items():
            part = result["protocols"][protocol]
            name = f"{protocol}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"
            about = ", ".join(f"{key} {value}" for key, value in values.items())
            curve = self._curves.setdefault(name, _Curve(self._folder / name, about, when))
            top1 = scalar(f"eval/{protocol}_top1", part["results"][TRAINED]["top1"])
            curve.add(Event(wall_time=when, step=int(result["encoder"]["step"]), summary=top1))
        for curve in self._curves.values():
            curve.write()


class _Curve:
    """One curve's points. A file holds ascending steps.

    A point that is not beyond the last opens a new file, as does the first after a start. It has the whole curve, in place of
    what is in older files. So no step is shown twice, and none is dropped as out of order.
    """

    def __init__(self, folder: Path, about: str, when: float) -> None:
        # What was shown before is void.
        start = Event(wall_time=when, step=0, session_log=SessionLog(status=SessionLog.START))
        summary = Event(wall_time=when, step=0, summary=text("eval/settings", about))
        self._opening = [Event(wall_time=when, file_version="brain.Event:2"), start, summary]
        self._folder = folder
        self._file: Path | None = None
        self._points: dict[int, Event] = {}
        self._unwritten: set[int] = set()
        self._last = -1

    def add(self, point: Event) -> None:
        self._points[point.step] = point
        self._unwritten.add(point.step)

    def write(self) -> None:
        if not self._unwritten:
            return
        steps, events, records, file = sorted(self._unwritten), list[Event](), io.BytesIO(), self._file
        if file is None or steps[0] <= self._last:
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            file, steps, events = self._folder / name, sorted(self._points), self._opening
        for event in [*events, *(self._points[step] for step in steps)]:
            RecordWriter(records).write(event.SerializeToString())
        self._folder.mkdir(parents=True, exist_ok=True)
        append(file, records.getvalue())
        for older in self._folder.glob("events.out.tfevents.*"):
            if older != file:
                older.unlink()
        self._file, self._last = file, steps[-1]
        self._unwritten.clear()


def board_folder(run: Path, layer: str) -> Path:
    """Return the folder of a layer's projector and curves."""
    return run / "tb" / ("eval" if layer == "h" else f"eval-{layer}")


def watchers_lock(run: Path) -> Path:
    """Return the file that a process locks while it watches the run. That process writes the run's curve."""
    return run / "eval" / ".watch"


def show_curve(run: Path, result: Result, say: Say) -> None:
    """Show `result` and earlier ones of the run, unless a watcher does. Earlier ones are of the same images and settings."""
    folder = board_folder(run, result["settings"]["layer"])
    with _unwatched(run) as free:
        if not free:
            say(f"{folder}: is written by the process that watches the run; this accuracy joins it when that is started again")
            return
        shown = Curves(folder)
        try:
            for step, (protocols, when) in sorted(comparable(run / "eval", result, say).items(), key=itemgetter(0)):
                shown.add({**result, "encoder": {"step": step}, "protocols": protocols}, when)
        except OSError as error:
            say(f"{folder}: the accuracy curve cannot be written: {reason_of(error)}")


def show_projector(folder: Path, title: str, images: Images, manifest: Manifest, h: Tensor, say: Say) -> None:
    """Put features [n, d] of `manifest`'s rows into the projector. At most `POINTS` of them are put there, drawn by `SEED`.

    Each point has its class and key as labels and a thumbnail. What another encoder has put there is replaced: some 4 MB of
    512 features. Files are written plainly: `add_embedding` needs a SummaryWriter, which does not outlive a full disk.
    """
    drawn = np.sort(np.random.Generator(np.random.PCG64(SEED)).permutation(len(h))[:POINTS]).tolist()
    lines = [f"{_name(manifest, int(manifest.label[row]))}\t{_plain(str(manifest.key[row]))}\n" for row in drawn]
    tensors, metadata, picture = (f"projector/{name}" for name in ("tensors.tsv", "metadata.tsv", "sprite.png"))
    config = ProjectorConfig()
    points = config.embeddings.add(tensor_name=title, tensor_path=tensors, metadata_path=metadata)
    points.tensor_shape.extend([len(drawn), h.shape[1]])
    points.sprite.image_path = picture
    points.sprite.single_image_dim.extend([_THUMBNAIL, _THUMBNAIL])
    numbers, events = io.BytesIO(), io.BytesIO()
    RecordWriter(events).write(Event(file_version="brain.Event:2").SerializeToString())
    np.savetxt(numbers, h[drawn].float().cpu().numpy(), fmt="%.5g", delimiter="\t")
    files = {
        tensors: numbers.getvalue(),
        metadata: "".join(["class\tkey\n", *lines]).encode(),
        picture: sprite(images, drawn),
        "events.out.tfevents.0.projector": events.getvalue(),  # TensorBoard takes no folder without one for a run
        "projector_config.pbtxt": text_format.MessageToString(config).encode(),  # last: it names the others
    }
    try:
        (folder / "projector").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        say(f"{folder}: the projector's files cannot be written: {reason_of(error)}")


def sprite(images: Images, rows: Sequence[int]) -> bytes:
    """Draw the images' thumbnails, row by row, as a square PNG. The projector wants it so."""
    side = math.ceil(math.sqrt(len(rows)))
    sheet = Image.new("RGB", (side * _THUMBNAIL, side * _THUMBNAIL), "white")
    for place, row in enumerate(rows):
        thumbnail = Image.fromarray(picture(eval_view(images[row].image, _THUMBNAIL)).permute(1, 2, 0).numpy())
        sheet.paste(thumbnail, (place % side * _THUMBNAIL, place // side * _THUMBNAIL))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _name(manifest: Manifest, label: int) -> str:
    return "" if label < 0 else _plain(manifest.classes[label]) if manifest.classes else str(label)


def _plain(text: str) -> str:
    return " ".join(text.split())  # one cell of a table with tabs


@contextmanager
def _unwatched(run: Path) -> Iterator[bool]:
    """Yield True with the lock of the run's watchers (`watch`) held. Yield False where another process has it."""
    try:
        file = watchers_lock(run).open("rb+")
    except OSError:
        yield True  # nobody has ever watched it
        return
    with file:
        free = True
        with suppress(OSError):  # a file system without locks
            free = lock(file.fileno())
        yield free
