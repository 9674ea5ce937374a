"""Every image exactly once, in order, on any number of real processes; one decode, one view, no change to the encoder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from evaluated import CARD, draw_images
from simclr_dist.data.reader import Sample, ShardDataset
from simclr_dist.data.views.crops import eval_view, normalise
from simclr_dist.encoder.file import load_encoder
from simclr_dist.evaluate.features.extraction import RAW_PIXELS, Features, extract, extract_features
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
    check(extract_features(encoder, images, **VIEW, batch_size=batch_size, workers=workers), images, encoder)


def test_one_decode_serves_all(make_encoder: Callable[..., Path]) -> None:
    encoders = {"a": load_encoder(make_encoder(1)), "b": load_encoder(make_encoder(2, run="other"))}
    images = CountingImages(7)
    found = extract(images, encoders, **VIEW, pixels=True, batch_size=3)
    assert images.decoded == [1] * 7
    for name, encoder in encoders.items():
        check(found[name], images, encoder)
    expected = torch.stack([eval_view(image, 16).flatten() for image in images.images])
    assert torch.equal(found[RAW_PIXELS].h, expected)
    assert torch.equal(pixels(images, 16).h, expected)
    assert pixels(images, 64).h.shape == (7, 3 * 32 * 32), "32 pixels at most"


def pixels(images: CountingImages, image_size: int) -> Features:
    return extract(images, {}, image_size=image_size, mean=(0, 0, 0), std=(1, 1, 1), pixels=True)[RAW_PIXELS]


def test_the_encoder_is_read_in_eval_mode_and_left_as_it_was(make_encoder: Callable[..., Path]) -> None:
    encoder, images = load_encoder(make_encoder()), CountingImages(9)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    in_eval = extract_features(encoder, images, **VIEW)
    encoder.train()
    in_training = extract_features(encoder, images, **VIEW)
    assert torch.equal(in_eval.h, in_training.h)
    assert encoder.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def extract_on_a_rank(rank: int, world_size: int, counts: list[int], encoder_file: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    for n in counts:
        images = CountingImages(n)
        found = extract(images, {"h": load_encoder(encoder_file)}, **VIEW, pixels=True, batch_size=4)
        parts = {name: tuple(part) for name, part in found.items()}
        torch.save(parts | {"decoded": images.decoded}, folder / f"{n}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_real_processes_give_what_one_gives(make_encoder: Callable[..., Path], tmp_path: Path, world_size: int) -> None:
    path, counts = make_encoder(), [13, 1]  # with one image, all ranks but the first have none
    mp.spawn(extract_on_a_rank, (world_size, counts, path, tmp_path), nprocs=world_size)
    encoder = load_encoder(path)
    for n in counts:
        images, alone = CountingImages(n), pixels(CountingImages(n), 16)
        ranks = [torch.load(tmp_path / f"{n}-{rank}.pt", weights_only=True) for rank in range(world_size)]
        assert torch.tensor([rank["decoded"] for rank in ranks]).sum(0).tolist() == [1] * n
        for rank in ranks:
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
        extract_features(load_encoder(make_encoder()), dataset, **VIEW, workers=workers)
    assert "\n" not in str(caught.value)


def test_an_empty_set_and_infinite_features_are_refused(make_encoder: Callable[..., Path]) -> None:
    encoder = load_encoder(make_encoder())
    with pytest.raises(DataError, match="no images"):
        extract_features(encoder, _Nothing(), **VIEW)
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(DataError, match="5 of 5 images is not finite"):
        extract_features(encoder, CountingImages(5), **VIEW)


class _Nothing:
    def __len__(self) -> int:
        return 0

    def __getitem__(self, row: int) -> Sample:
        raise IndexError(row)
