"""Draw one picture of a run: views, loss, and nearest neighbours."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from simclr_dist.config.load import load_config
from simclr_dist.data.order import Plan
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, two_views
from simclr_dist.encoder.file import load_encoder, untrained_encoder
from simclr_dist.evaluate.features.extraction import extract
from simclr_dist.evaluate.result.neighbours import find_neighbours
from simclr_dist.run.folder import read_metrics
from simclr_dist.train.describe import view_settings

_TILE, _GAP, _SHOWN, _NEIGHBOURS = 64, 4, 8, 7
_INK, _PAPER, _GRAY, _LINE, _RIGHT, _WRONG = "#222222", "white", "#999999", "#1f5fa8", "#2a8f3c", "#c43c35"


def draw(run: Path, encoder: Path, test: Path) -> Path:
    """Draw `run`/demo.png with neighbours from the shards `test`. Returns its path."""
    width, height = 2 * (_SHOWN * (_TILE + _GAP)) + 64, 760
    sheet = Image.new("RGB", (width, height), _PAPER)
    _views(sheet, run, (_GAP, 0))
    _loss(sheet, run, (width // 2 + 20, 0, width - 20, 160))
    images = ShardDataset(test)
    trained = load_encoder(encoder)
    card = trained.card
    assert isinstance(card, dict)
    networks = {"before training": untrained_encoder(card), "after SimCLR, no label seen": trained}
    for column, (title, network) in enumerate(networks.items()):
        _neighbours(sheet, images, network, f"nearest test images, {title}", (_GAP + column * (width // 2 + 16), 200))
    path = run / "demo.png"
    sheet.save(path)
    return path


def _views(sheet: Image.Image, run: Path, at: tuple[int, int]) -> None:
    config = load_config(run / "config.yaml")
    images, settings = ShardDataset(config.data.shards), view_settings(config)
    plan = Plan(images.manifest.shard_sizes, seed=config.seed, global_batch_size=_SHOWN)
    views = StepDataset(images, plan, settings)[0]
    _text(sheet, "two views of each image: SimCLR's only teacher", at)
    std, mean = (torch.tensor(value).view(3, 1, 1) for value in (settings.std, settings.mean))
    for row, batch in enumerate(two_views(views, settings, torch.device("cpu"))):
        for i, view in enumerate(batch):
            pixels = ((view * std + mean).clamp(0, 1) * 255).byte()
            _paste(sheet, pixels, (at[0] + i * (_TILE + _GAP), at[1] + 20 + row * (_TILE + _GAP)))


def _loss(sheet: Image.Image, run: Path, box: tuple[int, int, int, int]) -> None:
    lines = read_metrics(run)
    steps, losses = [line["step"] for line in lines], [line["loss/nt_xent"] for line in lines]
    chance, (left, top, right, bottom) = lines[0]["loss/chance"], box
    low, high = min(losses), max(chance, *losses)
    _text(sheet, f"loss: {losses[0]:.2f} to {losses[-1]:.2f} in {steps[-1]} steps (chance, gray: {chance:.2f})", (left, top))

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + (right - left) * step / steps[-1], bottom - (bottom - top - 24) * (loss - low) / (high - low)

    pen = ImageDraw.Draw(sheet)
    pen.line([place(0, chance), place(steps[-1], chance)], fill=_GRAY)
    pen.line([place(s, v) for s, v in zip(steps, losses, strict=True)], fill=_LINE, width=2)


def _neighbours(sheet: Image.Image, images: ShardDataset, network: nn.Module, title: str, at: tuple[int, int]) -> None:
    card = network.card
    assert isinstance(card, dict)
    features = extract(images, {title: network}, card)[title]
    labels = images.manifest.label
    queries = np.unique(labels, return_index=True)[1][:_SHOWN]  # the first image of each class
    nearest = find_neighbours(features.h, torch.from_numpy(queries), _NEIGHBOURS).nearest.tolist()
    same = sum(int(labels[j] == labels[q]) for q, row in zip(queries, nearest, strict=True) for j in row)
    _text(sheet, f"{title}: {same} of {len(queries) * _NEIGHBOURS} of the query's class", at)
    pen = ImageDraw.Draw(sheet)
    for row, (query, neighbours) in enumerate(zip(queries, nearest, strict=True)):
        for column, index in enumerate([int(query), *neighbours]):
            x, y = at[0] + column * (_TILE + _GAP) + (8 if column else 0), at[1] + 20 + row * (_TILE + _GAP)
            _paste(sheet, images[index].image, (x, y))
            if column:
                colour = _RIGHT if labels[index] == labels[query] else _WRONG
                pen.rectangle([x - 2, y - 2, x + _TILE + 1, y + _TILE + 1], outline=colour, width=2)


def _paste(sheet: Image.Image, image: Tensor, at: tuple[int, int]) -> None:
    sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((_TILE, _TILE), Image.Resampling.BICUBIC), at)


def _text(sheet: Image.Image, words: str, at: tuple[int, int]) -> None:
    ImageDraw.Draw(sheet).text((at[0], at[1] + 3), words, fill=_INK, font=ImageFont.load_default(12))
