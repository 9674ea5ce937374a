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
from simclr_dist.encoder.card import LoadedEncoder
from simclr_dist.encoder.file import load_encoder
from simclr_dist.encoder.names import result_path
from simclr_dist.encoder.preprocess import encoder_kind
from simclr_dist.evaluate.embed import ImageFiles
from simclr_dist.evaluate.features.extraction import Images, extract, in_precision
from simclr_dist.evaluate.features.file import About
from simclr_dist.evaluate.features.store import FeatureStore, features_folder
from simclr_dist.evaluate.result.neighbours import Neighbours, nearest_rows, neighbour_sheets
from simclr_dist.evaluate.result.page import picture_page, write_page
from simclr_dist.evaluate.result.report import Say
from simclr_dist.evaluate.sets import open_images
from simclr_dist.evaluate.settings import NeighbourSettings, SearchSettings
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import refusing
from simclr_dist.system.files import replacing

_LISTED = 1000  # pictures with their lines on the page; the table has all
IMAGE = {"key": pa.string(), "source": pa.string(), "label": pa.int64(), "class_name": pa.string()}
_COLUMNS = pa.schema({"picture": pa.string(), "rank": pa.int64(), **IMAGE, "cosine": pa.float32()})


def neighbours(
    world: World, encoder: str | Path, source: Source, among: str | Path, out: tuple[Path, Path], settings: NeighbourSettings,
    say: Say,
) -> int:  # fmt: skip
    """Write the page and the table `out`; return the number of pictures.

    `source` is from `sources.find_images`. Raises DataError for what cannot be read or written.
    """
    network = load_encoder(encoder, world.device, settings.layer)
    card = network.card
    pictures, images = ImageFiles(source, encoder_kind(card)), open_images(among, card, encoder)
    in_precision(network, settings.precision, world.device)
    queries = _extracted(world, network, pictures, settings, "pictures")
    h = shard_features(world, network, images, encoder, settings, say)
    cosine, nearest = (part.cpu() for part in nearest_rows(h, queries, min(settings.k, len(h))))
    rows = list(_rows(pictures, images, nearest.tolist(), cosine.tolist()))
    write_table(out[1], _COLUMNS, rows)
    title = f"{len(pictures)} pictures and their {nearest.shape[1]} nearest of {len(images)} images"
    facts = {"encoder": encoder, "images": among, **asdict(settings), "table": out[1].name}
    shown = [[row["picture"], str(row["rank"]), row["source"] or row["key"], f"{row['cosine']:.3f}"] for row in rows]
    every: Any = ConcatDataset([pictures, images])  # type: ignore[list-item]  # any map will do
    label = torch.cat([torch.full((len(pictures),), -1), torch.tensor(images.manifest.label).long()])
    drawn = Neighbours(torch.arange(len(pictures)), nearest + len(pictures), cosine)
    sheets = neighbour_sheets(every, drawn, label, images.manifest.classes, "pictures {} to {}, each beside its nearest")
    heads = ["picture", "rank", "image", "cosine"]
    write_page(out[0], picture_page(title, facts, sheets, heads, shown[: _LISTED * nearest.shape[1]]))
    return len(pictures)


def shard_features(
    world: World, network: LoadedEncoder, images: ShardDataset, encoder: str | Path, settings: SearchSettings, say: Say
) -> Tensor:
    """Return features of shards [n, d]. Out of the store that `eval` has too, else they are extracted and kept there.

    They lie in a mapped file where they are many.
    """
    manifest, card = images.manifest, network.card
    about = About.of_card(
        card, network.digests["sha256"], precision=settings.precision, data_digest=manifest.digest, classes=manifest.classes
    )
    folder = Path(settings.features) if settings.features else features_folder(result_path(encoder, None, settings.layer))
    store, keys = FeatureStore(folder, say), manifest.key.tolist()
    if table := store.find("images", about, keys):
        say(f"features of {len(keys)} images: {store.reused['images']}")
        return torch.from_numpy(table.embedding).to(world.device)
    h = _extracted(world, network, images, settings, "images")
    store.keep(about, keys, manifest.label, h.cpu().numpy())
    store.report()
    return h


def _extracted(world: World, network: LoadedEncoder, images: Images, settings: SearchSettings, title: str) -> Tensor:
    how: dict[str, Any] = {"batch_size": settings.batch_size, "workers": settings.workers, "device": world.device}
    return extract(images, {"encoder": network}, network.card, title=title, **how)["encoder"].h


def _rows(
    pictures: ImageFiles, images: ShardDataset, nearest: list[list[int]], cosine: list[list[float]]
) -> Iterator[dict[str, Any]]:
    """Yield the table's rows, as `_COLUMNS` has them."""
    for picture, neighbours_of in enumerate(zip(nearest, cosine, strict=True)):
        for rank, (row, value) in enumerate(zip(*neighbours_of, strict=True), start=1):
            yield {"picture": pictures.source(picture), "rank": rank, **describe(images, row), "cosine": value}


def describe(images: ShardDataset, row: int) -> dict[str, Any]:
    """Describe an image for a table, as `IMAGE` has it."""
    manifest, label = images.manifest, int(images.manifest.label[row])
    name = manifest.classes[label] if manifest.classes and label >= 0 else None
    return {
        "key": str(manifest.key[row]),
        "source": images.source(row),
        "label": label if label >= 0 else None,
        "class_name": name,
    }


def write_table(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    """Write rows as a Parquet file. Raises DataError when the disk does not take it."""
    with refusing(f"{path}: cannot write the table"), replacing(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
