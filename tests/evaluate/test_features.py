"""Every image exactly once, in order, on any number of real processes; one decode, one view, no change to the encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ranks
from evaluated import CARD, draw_images
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features, extract
from simclr_dist.method.distributed import World
from simclr_dist.system.errors import DataError, RankError

VIEW: dict[str, Any] = {"image_size": CARD["image_size"], "mean": CARD["mean"], "std": CARD["std"]}


class CountingImages:
    """An ODD number of images in memory, one of them without a label; counts how often each row is decoded."""

    def __init__(self, n: int) -> None:
        images, labels = draw_images(n, seed=0)
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.labels = [-1, *labels[1:].tolist()]
        self.decoded = [0] * n

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Sample:
        self.decoded[row] += 1
        return Sample(self.images[row], self.labels[row], row)


def one_by_one(encoder: nn.Module, images: CountingImages) -> torch.Tensor:
    with torch.no_grad():
        views = [eval_view(image, VIEW["image_size"]) for image in images.images]
        return torch.cat([encoder(normalise(view[None], VIEW["mean"], VIEW["std"])) for view in views])


def check(found: Features, images: CountingImages, encoder: nn.Module) -> None:
    assert found.row.tolist() == list(range(len(images)))
    assert found.label.tolist() == images.labels
    assert found.h.dtype == torch.float32
    torch.testing.assert_close(found.h, one_by_one(encoder, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("batch_size", "workers"), [(4, 0), (100, 0), (5, 2)])
def test_each_image_once_in_order(make_encoder: Callable[..., Path], batch_size: int, workers: int) -> None:
    encoder, images = load_encoder(make_encoder()), CountingImages(13)
    check(extract(images, {"h": encoder}, VIEW, batch_size=batch_size, workers=workers)["h"], images, encoder)


def test_one_decode_serves_all(make_encoder: Callable[..., Path]) -> None:
    encoders = {"a": load_encoder(make_encoder(1)), "b": load_encoder(make_encoder(2, run="other"))}
    images = CountingImages(7)
    found = extract(images, encoders, VIEW, pixels=True, batch_size=3)
    assert images.decoded == [1] * 7
    for name, encoder in encoders.items():
        check(found[name], images, encoder)
    expected = torch.stack([eval_view(image, 16).flatten() for image in images.images])
    assert torch.equal(found[RAW_PIXELS].h, expected)
    assert torch.equal(pixels(images, 16).h, expected)
    assert pixels(images, 64).h.shape == (7, 3 * 32 * 32), "32 pixels at most"


def pixels(images: CountingImages, image_size: int) -> Features:
    return extract(images, {}, {"image_size": image_size}, pixels=True)[RAW_PIXELS]


def test_the_encoder_is_read_in_eval_mode_and_left_as_it_was(make_encoder: Callable[..., Path]) -> None:
    encoder, images = load_encoder(make_encoder()), CountingImages(9)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    in_eval = extract(images, {"h": encoder}, VIEW)["h"]
    encoder.train()
    in_training = extract(images, {"h": encoder}, VIEW)["h"]
    assert torch.equal(in_eval.h, in_training.h)
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def extract_on_a_rank(_: World, counts: list[int], encoder_file: Path) -> list[dict[str, Any]]:
    results = []
    for n in counts:
        images = CountingImages(n)
        found = extract(images, {"h": load_encoder(encoder_file)}, VIEW, pixels=True, batch_size=4)
        results.append({name: tuple(part) for name, part in found.items()} | {"decoded": images.decoded})
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_processes_give_what_one_gives(make_encoder: Callable[..., Path], world_size: int) -> None:
    path, counts = make_encoder(), [13, 1]  # with one image, all ranks but the first have none
    by_rank = ranks.run(extract_on_a_rank, world_size, counts, path)
    encoder = load_encoder(path)
    for number, n in enumerate(counts):
        images, alone = CountingImages(n), pixels(CountingImages(n), 16)
        found = [results[number] for results in by_rank]
        assert torch.tensor([rank["decoded"] for rank in found]).sum(0).tolist() == [1] * n
        for rank in found:
            check(Features(*rank["h"]), images, encoder)
            assert all(torch.equal(a, b) for a, b in zip(rank[RAW_PIXELS], alone, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_one_line(make_shards: Callable[..., Path], make_encoder: Callable[..., Path], workers: int) -> None:
    images, labels = draw_images(8, seed=0)
    folder = make_shards("set", images, labels)
    dataset = ShardDataset(folder)
    tar = folder / "part-1.tar"
    content = bytearray(tar.read_bytes())
    content[int(dataset.manifest.offset[5]) + 60] ^= 1
    tar.write_bytes(content)
    with pytest.raises(RankError, match=r"part-1\.tar: image 000005") as caught:
        extract(dataset, {"h": load_encoder(make_encoder())}, VIEW, workers=workers)
    assert "\n" not in str(caught.value)


def test_an_empty_set_and_infinite_features_are_refused(make_encoder: Callable[..., Path]) -> None:
    encoder = load_encoder(make_encoder())
    with pytest.raises(DataError, match="no images"):
        extract(_Nothing(), {"h": encoder}, VIEW)
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="5 of 5 images is not finite"):
        extract(CountingImages(5), {"h": encoder}, VIEW)


class _Nothing:
    def __len__(self) -> int:
        return 0

    def __getitem__(self, row: int) -> Sample:
        raise IndexError(row)
