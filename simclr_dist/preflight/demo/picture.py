"""Draw one picture of a run: views, loss, and nearest neighbours."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from simclr_dist.config.load import load_config
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, two_views
from simclr_dist.encoder.file import load_encoder, untrained_encoder
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.result.neighbours import QUERIES, find_neighbours, neighbour_sheet
from simclr_dist.evaluate.result.picture import charts_png
from simclr_dist.run.folder import read_metrics
from simclr_dist.train.describe import view_grid, view_settings

_WIDTH = 620  # of the views


def draw(run: Path, encoder: Path, test: Path) -> Path:
    """Draw `run`/demo.png with neighbours from the shards `test`. Returns its path."""
    images, lines, trained = ShardDataset(test), read_metrics(run), load_encoder(encoder)
    losses = {name: [(line["step"], line[f"loss/{name}"]) for line in lines] for name in ("nt_xent", "chance")}
    pictures = [_views(run), _opened(charts_png({"loss": losses}, "steps"))]
    label, classes = images.manifest.label, images.manifest.classes
    query = torch.from_numpy(np.unique(label, return_index=True)[1][:QUERIES])  # the first image of each class
    for title, network in {"before training": untrained_encoder(trained.card), "after SimCLR, no label seen": trained}.items():
        near = find_neighbours(extract(images, {title: network}, trained.card)[title].h, query)
        title = f"nearest test images, {title}"
        pictures.append(_opened(neighbour_sheet(images, near, torch.tensor(label), classes=classes, title=title)))
    width, height = max(one.width for one in pictures), max(one.height for one in pictures[:2])
    sheet = Image.new("RGB", (2 * width, height + pictures[2].height), "white")
    for place, one in enumerate(pictures):
        sheet.paste(one, (width * (place % 2), height * (place // 2)))
    ImageDraw.Draw(sheet).text((_WIDTH // 4, height - 20), "two views of each image: SimCLR's only teacher", "black")
    sheet.save(path := run / "demo.png")
    return path


def _opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def _views(run: Path) -> Image.Image:
    """Draw two views of each of some images: SimCLR's only teacher."""
    config = load_config(run / "config.yaml")
    images, settings = ShardDataset(config.data.shards), view_settings(config)
    plan = Plan(images.manifest.shard_sizes, seed=config.seed, global_batch_size=16)
    views = two_views(StepDataset(images, plan, settings)[0], settings, torch.device("cpu"))
    grid = Image.fromarray((view_grid(*views, settings) * 255).byte().permute(1, 2, 0).numpy())
    return ImageOps.contain(grid, (_WIDTH, _WIDTH))
