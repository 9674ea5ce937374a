"""Views of images that are not 8-bit RGB, and the turns and inversions that no preset has, against torchvision in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor
from torchvision.transforms import InterpolationMode

from simclr_dist.convert.shards import write_shards
from simclr_dist.data.memory import DecodedImages
from simclr_dist.data.order import Plan
from simclr_dist.data.pixels import resize
from simclr_dist.data.pixels.kinds import RGB8, Kind
from simclr_dist.data.portions import Cut
from simclr_dist.data.reader import ShardDataset
from simclr_dist.data.steps import StepDataset, load_steps, two_views
from simclr_dist.data.stream import StreamImages
from simclr_dist.data.views.colour import colour_views
from simclr_dist.data.views.crops import crop_view, eval_view, normalise, picture, turn_views, visible
from simclr_dist.data.views.draws import PRESETS, ViewDraws, ViewSettings, draw_views, preset_views
from simclr_dist.system.errors import DataError

KINDS = [Kind(1, 8), Kind(1, 16), Kind(3, 16), Kind(4, 8), Kind(5, 16)]
DTYPES = {8: torch.uint8, 16: torch.uint16}
EVERYTHING = {"vertical_flip": 0.5, "rotate": 0.75, "solarize": 0.5}


def noise(count: int, kind: Kind, height: int, width: int, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    values = generator.integers(0, kind.most, (count, kind.channels, height, width), endpoint=True)
    return torch.from_numpy(values.astype(np.uint16 if kind.bit_depth == 16 else np.uint8))


def settings_of(kind: Kind, size: int, **changes: Any) -> ViewSettings:
    mean, std = [0.3 + 0.05 * c for c in range(kind.channels)], [0.2 + 0.03 * c for c in range(kind.channels)]
    return preset_views("imagenet", {"image_size": size, "mean": mean, "std": std, **changes})


def draw(settings: ViewSettings, count: int, side: int = 64) -> ViewDraws:
    sides = [side] * count
    return draw_views(settings, seed=3, epoch=1, rows=np.arange(count), view=0, heights=sides, widths=sides)


def each(change: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Change RGB as a whole, other channels one by one."""
    return torch.cat([change(part) for part in (image[None] if len(image) == 3 else image[:, None])])


def reference(crop: Tensor, draws: ViewDraws, index: int, settings: ViewSettings) -> Tensor:
    """A view in float64, by torchvision, channel by channel where these are no colours."""
    image = crop.double() / (255 if crop.dtype == torch.uint8 else 65535)
    brightness, contrast, saturation, hue = draws.factors[index].tolist()
    if draws.jitter[index]:
        for operation in draws.order[index]:
            if operation == 0:
                image = each(lambda part: tv.adjust_brightness(part, brightness), image)
            elif operation == 1:
                image = each(lambda part: tv.adjust_contrast(part, contrast), image)
            elif len(image) == 3:
                image = tv.adjust_saturation(image, saturation) if operation == 2 else tv.adjust_hue(image, hue)
    if draws.gray[index]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    kernel = settings.image_size // 10 // 2 * 2 + 1
    if draws.blur_sigma[index] > 0:
        image = tv.gaussian_blur(image, [kernel, kernel], [float(draws.blur_sigma[index])])
    if draws.solarize[index]:
        image = each(lambda part: tv.solarize(part, 0.5), image)
    return tv.normalize(image, list(settings.mean), list(settings.std))


@pytest.mark.parametrize("kind", [RGB8, *KINDS], ids=str)
def test_views_are_torchvisions(kind: Kind) -> None:
    """Of smooth pictures: solarize has a jump, and where rounding puts a pixel on the other side there is no oracle."""
    settings, count = settings_of(kind, 40, solarize=0.5), 60
    coarse = torch.rand(count, kind.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=40, mode="bilinear")
    crops = torch.from_numpy((smooth.double() * kind.most).numpy().round()).to(DTYPES[kind.bit_depth])
    draws = draw(settings, count)
    assert 20 < draws.solarize.sum() < 40
    ours, expected = colour_views(crops, draws, settings), torch.stack([
        reference(crops[index], draws, index, settings) for index in range(count)
    ])  # fmt: skip
    far = (ours - expected).abs() > 2e-4
    assert far.double().mean() < 1e-5
    assert not far[torch.from_numpy(~draws.solarize)].any()
    for chosen in ([3], [19, 4, 11], list(range(1, 14))):
        part = ViewDraws(*(field[chosen] for field in draws))
        assert torch.equal(colour_views(crops[chosen], part, settings), ours[chosen]), "the same bits in any company"


def test_solarize_inverts_from_the_middle_on() -> None:
    settings = replace(
        PRESETS["imagenet"], image_size=16, jitter=0.0, gray=0.0, blur=0.0, solarize=1.0, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    crops = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).clone()
    ours = colour_views(crops, draw(settings, 2), settings)[0, 0].flatten()
    assert torch.allclose(ours[:128], torch.arange(128) / 255)
    assert torch.allclose(ours[128:], 1 - torch.arange(128, 256) / 255)


@pytest.mark.parametrize("bits", [8, 16])
def test_turns_are_exact(bits: int) -> None:
    settings, crops = replace(PRESETS["small"], **EVERYTHING), noise(200, Kind(2, bits), 9, 9)
    draws = draw(settings, 200)
    ours = turn_views(crops.clone(), draws)
    for index in range(200):
        view = tv.vertical_flip(crops[index]) if draws.vertical_flip[index] else crops[index]
        assert torch.equal(ours[index], torch.rot90(view, int(draws.turns[index]), (-2, -1)))


def test_new_draws_come_from_new_places() -> None:
    """Golden values, and the old draws beside them as they were."""
    rows = np.arange(20_000)
    drawn = [
        draw_views(settings, seed=0, epoch=0, rows=rows, view=1, heights=[50] * len(rows), widths=[60] * len(rows))
        for settings in (PRESETS["imagenet"], replace(PRESETS["imagenet"], **EVERYTHING))
    ]
    for name in ViewDraws._fields[:7]:
        assert np.array_equal(getattr(drawn[0], name), getattr(drawn[1], name)), name
    assert not drawn[0].vertical_flip.any()
    assert not drawn[0].turns.any()
    assert not drawn[0].solarize.any()
    assert np.abs(np.bincount(drawn[1].turns) / len(rows) - 0.25).max() < 0.01
    assert abs(drawn[1].vertical_flip.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(drawn[1].vertical_flip, drawn[1].flip)[0, 1]) < 0.02
    assert drawn[1].vertical_flip[:8].tolist() == GOLDEN["vertical_flip"]
    assert drawn[1].turns[:8].tolist() == GOLDEN["turns"]
    assert drawn[1].solarize[:8].tolist() == GOLDEN["solarize"]


GOLDEN: dict[str, list[Any]] = {
    "vertical_flip": [False, False, True, True, True, True, False, True],
    "turns": [3, 0, 0, 2, 1, 0, 2, 1],
    "solarize": [False, True, True, True, True, False, True, True],
}


def test_without_three_channels_a_preset_has_no_colour() -> None:
    settings = settings_of(Kind(1, 8), 32)
    assert (settings.saturation, settings.hue, settings.gray, settings.brightness) == (0, 0, 0, 0.8)
    assert preset_views("imagenet", {}).hue == 0.2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "box"), [(32, (3, 5, 40, 50)), (32, (7, 9, 12, 20)), (32, (1, 2, 32, 32)), (8, (0, 0, 64, 70))]
)
def test_a_crop_of_16_bits_is_the_rounded_one(size: int, box: tuple[int, ...], interpolation: str) -> None:
    image = noise(1, Kind(5, 16), 64, 70)[0]
    mode = InterpolationMode(interpolation)
    exact = tv.resized_crop(image.double(), *box, [size, size], mode, antialias=True).clamp(0, 65535)
    ours = crop_view(image, np.array(box), False, size, interpolation)
    assert ours.dtype == torch.uint16
    assert (ours.double() - exact).abs().max() < 0.6, "half a level of 65535, and float32"
    assert torch.equal(crop_view(image, np.array(box), True, size, interpolation), ours.flip(-1))
    exact = tv.center_crop(tv.resize(image.double(), [size], InterpolationMode.BICUBIC, antialias=True), [size, size])
    assert (eval_view(image, size).double() - exact.clamp(0, 65535)).abs().max() < 0.6


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_crops_of_a_batch_have_the_bits_of_single_ones(channels: int) -> None:
    images, random = noise(30, Kind(channels, 8), 20, 24), np.random.default_rng(1)
    box = np.stack(
        [random.integers(0, 5, 30), random.integers(0, 5, 30), random.integers(1, 16, 30), random.integers(1, 20, 30)], 1
    )
    flip, which = random.random(30) < 0.5, random.permutation(30)
    ours = resize.crop_views(images, which, box, flip, 16, "bicubic")
    for place, row in enumerate(which):
        assert torch.equal(ours[place], crop_view(images[row], box[place], bool(flip[place]), 16, "bicubic"))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """30 images of 20 x 20 pixels, in shards of 8."""
    kind, folder = request.param, tmp_path_factory.mktemp("kind")
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    (folder / "src").mkdir()
    for number, image in enumerate(noise(30, kind, 20, 20)):
        pixels = image.permute(1, 2, 0).numpy()
        pixels = pixels[..., 0] if kind.channels == 1 else pixels
        tifffile.imwrite(
            folder / "src" / f"{number:02}.tif",
            pixels,
            photometric="minisblack",
            **({"planarconfig": "contig"} if kind.channels > 1 else {}),
        )
    write_shards(folder / "src", folder / "out", shard_size=8, processes=1, channels=kind.channels, bit_depth=kind.bit_depth)
    return ShardDataset(folder / "out")


def plan(rank: int = 0, world_size: int = 1, micro_batches: int = 1) -> Plan:
    return Plan(np.array([8, 8, 8, 6]), 3, 12, window=2, rank=rank, world_size=world_size, micro_batches=micro_batches)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_views_do_not_depend_on_workers_ranks_and_micro_batches(shards: ShardDataset) -> None:
    settings = settings_of(shards.kind, 16, **EVERYTHING)

    def by_row(world_size: int = 1, micro_batches: int = 1, workers: int = 0, images: Any = shards) -> dict[int, list[Tensor]]:
        found = {}
        for rank in range(world_size):
            steps = StepDataset(images, plan(rank, world_size, micro_batches), settings)
            (views,) = load_steps(steps, range(1, 2), workers=workers)
            assert views.portions[0].crops[0].dtype == DTYPES[shards.kind.bit_depth]
            coloured = two_views(views, settings, torch.device("cpu"))
            found |= {int(row): [view[place] for view in coloured] for place, row in enumerate(views.rows)}
        return found

    alone = by_row()
    assert len(alone) == 12
    decoded = DecodedImages(shards)
    assert all(torch.equal(decoded[row].image, shards[row].image) for row in range(len(shards)))
    assert decoded.of_one_size == (shards.kind.bit_depth == 8)
    for how in ({"world_size": 3}, {"micro_batches": 3}, {"workers": 1}, {"images": decoded}):
        other = by_row(**how)  # type: ignore[arg-type]
        assert other.keys() == alone.keys()
        for row, views in alone.items():
            assert all(torch.equal(a, b) for a, b in zip(views, other[row], strict=True)), how


@pytest.mark.parametrize("held", [False, True])
def test_a_steps_crops_are_turned_as_drawn(shards: ShardDataset, held: bool) -> None:
    images, plain = DecodedImages(shards) if held else shards, settings_of(shards.kind, 16)
    turned = replace(plain, vertical_flip=0.5, rotate=0.75)
    for ours, straight in zip(*(StepDataset(images, plan(), kind)[1].portions for kind in (turned, plain)), strict=True):
        for view in range(2):
            assert not torch.equal(ours.crops[view], straight.crops[view])
            assert torch.equal(ours.crops[view], turn_views(straight.crops[view].clone(), ours.draws[view]))


def test_a_portion_counts_the_bytes_of_its_kind() -> None:
    assert Cut(1, 64, 224).portion_bytes * 5 / 3 == pytest.approx(
        Cut(1, 64, 224, Kind(5, 8).pixel_bytes).portion_bytes, rel=0.05
    )
    assert Cut(1, 4096, 224, 26).largest == 2**24 // (2 * 26 * 224**2)


def test_pictures_for_people() -> None:
    """RGB as it is; else the first three channels, or the first as gray, as bright as the brightest allows."""
    rgb = noise(1, RGB8, 8, 8)[0]
    assert picture(rgb) is rgb
    dim = (noise(1, Kind(5, 16), 8, 8)[0].to(torch.int32) // 20).to(torch.uint16)
    shown = picture(dim)
    assert shown.dtype == torch.uint8
    assert (shown.shape, int(shown.max())) == ((3, 8, 8), 255)
    gray = picture(noise(1, Kind(1, 8), 8, 8)[0])
    assert torch.equal(gray[0], gray[2])
    assert visible(torch.rand(4, 2, 8, 8)).shape == (4, 3, 8, 8)


def test_normalise_divides_by_the_full_channel() -> None:
    for kind in (Kind(2, 8), Kind(2, 16)):
        full = torch.full((1, 2, 3, 3), kind.most).to(DTYPES[kind.bit_depth])
        assert torch.equal(normalise(full, (0.0, 0.5), (1.0, 0.5)), torch.ones(1, 2, 3, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stream_gives_the_pixels_of_the_shards(shards: ShardDataset) -> None:
    """From tars without a look at the manifest; a TIFF is a member like others where the kind asks for it."""
    kind, folder = shards.kind, shards.manifest.folder
    stream = StreamImages(f"{folder}/shard-{{000000..000003}}.tar", 30, seed=0, shuffle=1, kind=kind)
    read = {stream[row].image.contiguous().numpy().tobytes() for row in range(30)}
    assert read == {shards[row].image.contiguous().numpy().tobytes() for row in range(30)}
    if kind.channels not in (1, 3):
        with pytest.raises(DataError, match=f"has {kind.channels} channels, and 1 are asked for"):
            StreamImages(f"{folder}/shard-000000.tar", 30, seed=0, kind=Kind(1, 16))[0]
