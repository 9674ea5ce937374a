"""Find the images of a collection that are nearest to some pictures. Writes a page with them, and a table."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from simclr_dist.convert.sources.originals import Source
from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import load_encoder
from simclr_dist.encoder.names import result_path
from simclr_dist.encoder.preprocess import encoder_kind
from simclr_dist.evaluate.embed import ImageFiles
from simclr_dist.evaluate.features.extraction import Features, Images, extract, in_precision
from simclr_dist.evaluate.features.file import About
from simclr_dist.evaluate.features.store import FeatureStore, features_folder
from simclr_dist.evaluate.result.neighbours import Neighbours, nearest_rows, neighbour_sheet
from simclr_dist.evaluate.result.page import picture_page, write_page
from simclr_dist.evaluate.result.report import Say
from simclr_dist.evaluate.sets import check_channels
from simclr_dist.evaluate.settings import NeighbourSettings
from simclr_dist.evaluate.sources import PAGE, TABLE
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import DataError, reason_of
from simclr_dist.system.files import replacing

_DRAWN, _LISTED, _A_SHEET = 200, 1000, 20  # pictures on the page; the table has all
_TEXT, _NUMBER = pa.string(), pa.int64()
_COLUMNS = pa.schema(
    {
        "picture": _TEXT, "rank": _NUMBER, "key": _TEXT, "source": _TEXT, "label": _NUMBER, "class_name": _TEXT,
        "cosine": pa.float32(),
    }
)  # fmt: skip


def neighbours(
    world: World, encoder: str | Path, source: Source, among: str | Path, out: Path, settings: NeighbourSettings, say: Say
) -> int:
    """Write `out`/neighbours.html and neighbours.parquet; return how many pictures were asked for.

    `source` is from `sources.find_images`. Features of `among` come out of the store that `eval` has too, or are extracted and
    kept there. They lie in a mapped file where they are many. Raises DataError for what cannot be read or written.
    """
    network = load_encoder(encoder, world.device, settings.layer)
    card, digests = network.card, network.digests
    pictures, images = ImageFiles(source, encoder_kind(card)), ShardDataset(among, checked=True)
    manifest = images.manifest
    check_channels(manifest, card, encoder)
    in_precision(network, settings.precision, world.device)
    how: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers, "device": world.device}

    def extracted(what: Images, title: str) -> Features:
        return extract(what, {"encoder": network}, card, title=title, **how)["encoder"]

    about = About.of_card(
        card, digests["sha256"], precision=settings.precision, data_digest=manifest.digest, classes=manifest.classes
    )
    folder = Path(settings.features) if settings.features else features_folder(result_path(encoder, None, settings.layer))
    store, keys = FeatureStore(folder, say), manifest.key.tolist()
    queries = extracted(pictures, "pictures").h
    if table := store.find("among", about, keys):
        h = torch.from_numpy(table.embedding).to(world.device)
        say(f"features of {len(h)} images: {store.reused['among']}")
    else:
        h = extracted(images, "images").h
        store.keep(about, keys, manifest.label, h.cpu().numpy())
        store.report()
    cosine, nearest = (part.cpu() for part in nearest_rows(h, queries, min(settings.k, len(h))))
    table_rows = list(_rows(pictures, images, nearest.tolist(), cosine.tolist()))
    _write_table(out / TABLE, table_rows)
    title = f"{len(pictures)} pictures and their {nearest.shape[1]} nearest of {len(images)} images"
    facts = {"encoder": str(encoder), "images": str(among), **asdict(settings), "table": TABLE}
    shown = [[row["picture"], str(row["rank"]), row["source"] or row["key"], f"{row['cosine']:.3f}"] for row in table_rows]
    heads = ["picture", "rank", "image", "cosine"]
    text = picture_page(title, facts, _sheets(pictures, images, nearest, cosine), heads, shown[: _LISTED * nearest.shape[1]])
    write_page(out / PAGE, text)
    return len(pictures)


def _sheets(pictures: ImageFiles, images: ShardDataset, nearest: Tensor, cosine: Tensor) -> list[bytes]:
    """Draw the first pictures with their neighbours, some on each sheet."""
    every: Any = ConcatDataset([pictures, images])  # type: ignore[list-item]  # any map will do
    label = torch.cat([torch.full((len(pictures),), -1), torch.tensor(images.manifest.label).long()])
    sheets = []
    for rows in torch.arange(min(len(pictures), _DRAWN)).split(_A_SHEET):
        drawn = Neighbours(rows, nearest[rows] + len(pictures), cosine[rows])
        title = f"pictures {int(rows[0]) + 1} to {int(rows[-1]) + 1}, each beside its nearest"
        sheets.append(neighbour_sheet(every, drawn, label, classes=images.manifest.classes, title=title))
    return sheets


def _rows(
    pictures: ImageFiles, images: ShardDataset, nearest: list[list[int]], cosine: list[list[float]]
) -> Iterator[dict[str, Any]]:
    """Yield the table's rows, as `_COLUMNS` has them."""
    manifest = images.manifest
    for picture, neighbours_of in enumerate(zip(nearest, cosine, strict=True)):
        for rank, (row, value) in enumerate(zip(*neighbours_of, strict=True), start=1):
            label: int | None = int(manifest.label[row])
            label = None if label == -1 else label
            yield {
                "picture": pictures.source(picture), "rank": rank, "key": str(manifest.key[row]), "source": images.source(row),
                "label": label, "class_name": manifest.classes[label] if manifest.classes and label is not None else None,
                "cosine": value,
            }  # fmt: skip


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with replacing(path) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_COLUMNS), file, compression="zstd")
    except OSError as error:
        raise DataError(f"{path}: cannot write the table: {reason_of(error)}") from None
