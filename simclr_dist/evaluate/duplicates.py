"""Find near-duplicates: in a set of images, or between two sets. Writes a page with them, and a table of pairs."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import ConcatDataset

from simclr_dist.data.reader import ShardDataset
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate.features.extraction import in_precision
from simclr_dist.evaluate.neighbours import IMAGE, describe, shard_features, write_table
from simclr_dist.evaluate.result.neighbours import NEIGHBOURS, Neighbours, neighbour_sheets
from simclr_dist.evaluate.result.page import picture_page, write_page
from simclr_dist.evaluate.result.report import Say
from simclr_dist.evaluate.sets import open_images
from simclr_dist.evaluate.settings import DuplicateSettings
from simclr_dist.evaluate.signals import pairs
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import DataError

_KEPT, _DRAWN, _LISTED = 100_000, 200, 1000  # pairs in the table; groups on the page, and pairs there
_QUANTILES = {"half": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
_COLUMNS = pa.schema(
    {**IMAGE, **{f"other_{name}": of for name, of in IMAGE.items()}, "cosine": pa.float32(), "equal": pa.bool_()}
)

_Pairs = Iterable[tuple[int, int, float]]


def duplicates(
    world: World, encoder: str | Path, shards: str | Path, among: str | Path | None, out: tuple[Path, Path],
    settings: DuplicateSettings, say: Say,
) -> list[str]:  # fmt: skip
    """Write the page and the table `out`; return lines for people.

    Pairs are of images of `shards` with each other, or with those of `among`. All are compared, some thousand at a time, and
    the nearest 100,000 are kept. Raises DataError for what cannot be read or written.
    """
    network = load_encoder(encoder, world.device, settings.layer)
    sets = [open_images(where, network.card, encoder) for where in ([shards] if among is None else [shards, among])]
    images, others = sets[0], sets[-1]
    if others is images and len(images) < 2:
        raise DataError(f"{shards}: there is no other image to be near to; name a larger set, or another one with --among")
    if others is not images and images.manifest.digest == others.manifest.digest:
        raise DataError(f"{among}: has the same images as {shards}; leave --among out, and each is compared with the others")
    in_precision(network, settings.precision, world.device)
    h = [shard_features(world, network, images, encoder, settings, say) for images in sets]
    near = pairs(*h, threshold=settings.above, listed=_KEPT)
    rows = list(_rows(images, others, near.nearest))
    write_table(out[1], _COLUMNS, rows)
    between = f"{len(images)} images" + (f" and {len(others)} others" if among else "")
    title = f"{between}: {near.duplicates} pairs with a cosine above {settings.above:g}"
    ranked = near.cosine.sort().values
    usual = {name: f"{float(ranked[int(share * (len(ranked) - 1))]):.3f}" for name, share in _QUANTILES.items()}
    lines = [
        f"{sum(row['equal'] for row in rows)} of the pairs are equal byte for byte",
        f"cosine of an image and its nearest, by the share of images below it: {', '.join(map(' '.join, usual.items()))}",
    ]
    if not rows:
        lines.append(f"the nearest pair has {float(ranked[-1]):.3f}: a smaller --above shows what is near")
    if near.duplicates > len(rows):
        lines.append(f"the nearest {len(rows)} pairs are in the table; a larger --above leaves the others out")
    facts = {"encoder": encoder, "images": shards, "among": among or shards, **asdict(settings), "table": out[1].name}
    shown = [
        [row["source"] or row["key"], row["other_source"] or row["other_key"], f"{row['cosine']:.4f}", "bytes" * row["equal"]]
        for row in rows[:_LISTED]
    ]
    sheets = _sheets(images, others, _groups(near.nearest, apart=among is not None)[:_DRAWN])
    write_page(out[0], picture_page(title, facts, sheets, ["image", "the other", "cosine", "equal"], shown, lines))
    return [title, *lines]


def _groups(pairs: _Pairs, *, apart: bool) -> list[tuple[int, list[tuple[int, float]]]]:
    """Group each image with those near to it, the nearest first. Groups with the nearest come first.

    Of one set, an image is in one group, whose first is the earliest row: what is near to a member alone does not join.
    """
    groups, members = defaultdict[int, list[tuple[int, float]]](list), set[int]()
    for row, other, cosine in sorted(pairs):
        if apart or not members & {row, other}:
            groups[row].append((other, cosine))
            members.add(other)
    ranked = [(row, sorted(group, key=lambda one: -one[1])) for row, group in groups.items()]
    return sorted(ranked, key=lambda one: -one[1][0][1])


def _sheets(images: ShardDataset, others: ShardDataset, groups: list[tuple[int, list[tuple[int, float]]]]) -> list[bytes]:
    """Draw the groups' first images beside the nearest of the others."""
    every: Any = ConcatDataset([images, others])
    drawn = [group[:NEIGHBOURS] for _, group in groups]
    nearest = [[other + len(images) for other, _ in group] + [-1] * (NEIGHBOURS - len(group)) for group in drawn]
    cosine = [[value for _, value in group] + [0.0] * (NEIGHBOURS - len(group)) for group in drawn]
    near = Neighbours(torch.tensor([row for row, _ in groups]), torch.tensor(nearest), torch.tensor(cosine))
    title = "groups {} to {}: an image, and those near to it"
    no_label = torch.full((len(every),), -1)  # two sets may number their classes in other ways; the table has their names
    return neighbour_sheets(every, near, no_label, (), title)


def _rows(images: ShardDataset, others: ShardDataset, pairs: _Pairs) -> Iterator[dict[str, Any]]:
    """Yield the table's rows, as `_COLUMNS` has them."""
    about = {one: functools.cache(functools.partial(describe, one)) for one in (images, others)}
    for row, other, cosine in pairs:
        beside = {f"other_{name}": value for name, value in about[others](other).items()}
        equal = bool((images.manifest.sha256[row] == others.manifest.sha256[other]).all())
        yield {**about[images](row), **beside, "cosine": cosine, "equal": equal}
