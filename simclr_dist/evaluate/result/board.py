"""What an evaluation shows in the run's TensorBoard: the curve so far, and the features in the projector, with thumbnails."""

import fcntl
import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

import numpy as np
from google.protobuf import text_format  # type: ignore[import-untyped]
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig  # type: ignore[import-untyped]
from torch import Tensor

from simclr_dist.data.manifest import Manifest
from simclr_dist.data.views.crops import eval_view
from simclr_dist.evaluate.features.extraction import Images
from simclr_dist.evaluate.result.curve import Curve
from simclr_dist.evaluate.result.earlier import comparable
from simclr_dist.evaluate.result.report import Result, Say
from simclr_dist.system.files import write_atomically

POINTS = 1000  # of the projector: its sprite stays below the browsers' 8192 pixels, and t-SNE below a minute
SEED = 0
_THUMBNAIL = 32


def board_folder(run: Path, layer: str) -> Path:
    """Beside the training's events, for a layer of its own; see `curve.Curve` on why not among them."""
    return run / "tb" / ("eval" if layer == "h" else f"eval-{layer}")


def show_curve(run: Path, result: Result, say: Say) -> None:
    """`result` with the run's earlier ones of the same images and settings; a watcher of the run is not interfered with."""
    folder = board_folder(run, result["settings"]["layer"])
    with _unwatched(run) as free:
        if not free:
            say(f"{folder}: is written by the process that watches the run; this accuracy joins it when that is started again")
            return
        curve = Curve(folder)
        try:
            for step, (protocols, when) in sorted(comparable(run / "eval", result).items(), key=itemgetter(0)):
                curve.add({"encoder": {"step": step}, "protocols": protocols}, when)
        except OSError as error:
            say(f"{folder}: the accuracy curve cannot be written: {error.strerror or error}")


def show_projector(folder: Path, title: str, images: Images, manifest: Manifest, h: Tensor, say: Say) -> None:
    """Put features [n, d] of all rows of `manifest` into the projector: at most `POINTS` of them, drawn by `SEED`.

    Each point has its class and key as labels and a thumbnail. What another encoder has put there is replaced: some 4 MB of
    512 features. Files are written plainly, as `add_embedding` needs a SummaryWriter, which does not outlive a full disk.
    """
    drawn = np.sort(np.random.Generator(np.random.PCG64(SEED)).permutation(len(h))[:POINTS])
    names = [_name(manifest, int(manifest.label[row])) for row in drawn]
    lines = ["class\tkey", *(f"{name}\t{_plain(str(manifest.key[row]))}" for name, row in zip(names, drawn, strict=True))]
    config = ProjectorConfig()
    told = config.embeddings.add(tensor_name=title, tensor_path="projector/tensors.tsv", metadata_path="projector/metadata.tsv")
    told.tensor_shape.extend([len(drawn), h.shape[1]])
    told.sprite.image_path = "projector/sprite.png"
    told.sprite.single_image_dim.extend([_THUMBNAIL, _THUMBNAIL])
    numbers = io.StringIO()
    np.savetxt(numbers, h[drawn.tolist()].float().cpu().numpy(), fmt="%.5g", delimiter="\t")
    files = {
        "projector/tensors.tsv": numbers.getvalue().encode(),
        "projector/metadata.tsv": ("\n".join(lines) + "\n").encode(),
        "projector/sprite.png": sprite(images, drawn.tolist()),
        "projector_config.pbtxt": text_format.MessageToString(config).encode(),  # last: it names the others
    }
    try:
        (folder / "projector").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        say(f"{folder}: the projector's files cannot be written: {error.strerror or error}")


def sprite(images: Images, rows: Sequence[int]) -> bytes:
    """A PNG of the images' thumbnails, row by row in a square of squares, as the projector wants it."""
    side = math.ceil(math.sqrt(len(rows)))
    sheet = Image.new("RGB", (side * _THUMBNAIL, side * _THUMBNAIL), "white")
    for place, row in enumerate(rows):
        thumbnail = Image.fromarray(eval_view(images[row].image, _THUMBNAIL).permute(1, 2, 0).numpy())
        sheet.paste(thumbnail, (place % side * _THUMBNAIL, place // side * _THUMBNAIL))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return content.getvalue()


def _name(manifest: Manifest, label: int) -> str:
    return "" if label < 0 else _plain(manifest.classes[label]) if manifest.classes else str(label)


def _plain(text: str) -> str:
    """In one cell of a table with tabs."""
    return " ".join(text.split())


@contextmanager
def _unwatched(run: Path) -> Iterator[bool]:
    """Hold the lock of the run's watchers (`watch`) for the block, where nobody has it; else the block is told so."""
    try:
        lock = os.open(run / "eval" / ".watch", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield True  # nobody has ever watched it
        return
    try:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks
        yield free
    finally:
        os.close(lock)
