"""The pixels of a view, against torchvision's functional transforms applied image by image."""

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from simclr_dist.data.views import colour
from simclr_dist.data.views.colour import colour_views
from simclr_dist.data.views.compiled import compile_colour
from simclr_dist.data.views.crops import crop_view, eval_view, normalise
from simclr_dist.data.views.draws import PRESETS, ViewDraws, ViewSettings, draw_views

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


def pictures(count: int, size: int, seed: int = 0) -> Tensor:
    """Smooth, noisy, gray and saturated images, uint8 [count, 3, size, size]; hue has all its special cases in them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = (torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") * 255).to(torch.uint8)
    images = torch.where((torch.arange(count) % 3 == 0)[:, None, None, None], noise, smooth)
    images[1::7] = images[1::7, :1]
    images[2::7] = torch.where(noise[2::7] > 127, 255, 0).to(torch.uint8)
    return images


def reference_colour(crop: Tensor, draws: ViewDraws, index: int, settings: ViewSettings) -> Tensor:
    image = tv.to_dtype(crop, torch.float32, scale=True)
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    if draws.jitter[index]:
        for operation in draws.order[index]:
            image = operations[operation](image, float(draws.factors[index, operation]))
    if draws.gray[index]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    kernel = settings.image_size // 10 // 2 * 2 + 1
    if draws.blur_sigma[index] > 0 and kernel > 1:
        image = tv.gaussian_blur(image, [kernel, kernel], [float(draws.blur_sigma[index])])
    return tv.normalize(image, list(settings.mean), list(settings.std))


def reference_view(image: Tensor, draws: ViewDraws, index: int, settings: ViewSettings) -> Tensor:
    size = [settings.image_size, settings.image_size]
    crop = tv.resized_crop(image, *draws.box[index].tolist(), size, MODES[settings.interpolation], antialias=True)
    crop = tv.horizontal_flip(crop) if draws.flip[index] else crop
    return reference_colour(crop, draws, index, settings)


def draw(settings: ViewSettings, count: int, height: int = 300, width: int = 400) -> ViewDraws:
    return draw_views(
        settings, seed=0, epoch=0, rows=np.arange(count), view=0, heights=[height] * count, widths=[width] * count
    )


def unnormalised(size: int, **changed: float) -> ViewSettings:
    return replace(ViewSettings(), image_size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **changed)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "box"),
    [(32, (3, 5, 40, 50)), (32, (0, 0, 64, 70)), (32, (7, 9, 12, 20)), (32, (1, 2, 32, 32)), (96, (9, 0, 50, 66))],
)
def test_crop_is_torchvisions(size: int, box: tuple[int, ...], channels_last: bool, interpolation: str) -> None:
    image = pictures(1, 70)[0, :, :64]
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if channels_last else image.contiguous()
    expected = tv.resized_crop(image, *box, [size, size], MODES[interpolation], antialias=True)
    ours = crop_view(image, np.array(box), False, size, interpolation)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, size, size)
    assert (ours.int() - expected.int()).abs().max() <= 1
    assert torch.equal(crop_view(image, np.array(box), True, size, interpolation), ours.flip(-1))


def test_a_crop_never_shares_memory_with_the_image() -> None:
    image = pictures(1, 32)[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    before = image.clone()
    crop_view(image, np.array([0, 0, 32, 32]), False, 32, "bicubic").zero_()
    assert torch.equal(image, before)


def test_crop_of_a_photograph_is_pillows() -> None:
    """Bicubic overshoots are rounded and clipped between the two passes, and where depends on the kernel: so its mean."""
    files = sorted(PHOTOS.glob("*.JPEG"))[:3]
    if not files:
        pytest.skip(f"no photographs in {PHOTOS}")
    for file in files:
        with Image.open(file) as opened:
            photo = opened.convert("RGB")
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
        top, left, height, width = 20, 31, 171, 140
        crop = photo.crop((left, top, left + width, top + height))
        for interpolation, worst, mean in (("bilinear", 1, 0.4), ("bicubic", 8, 0.4)):
            expected = np.array(crop.resize((112, 112), Image.Resampling[interpolation.upper()]))
            ours = crop_view(pixels, np.array([top, left, height, width]), False, 112, interpolation)
            difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
            assert difference.max() <= worst
            assert difference.mean() < mean


@pytest.mark.parametrize("operation", [0, 1, 2, 3])
def test_each_jitter_operation_is_torchvisions(operation: int) -> None:
    crops, settings = pictures(42, 20), unnormalised(20, gray=0.0, blur=0.0, jitter=1.0, hue=0.5)
    draws = draw(settings, 42)
    factors = np.tile(np.float32([1, 1, 1, 0]), (42, 1))
    factors[:, operation] = draws.factors[:, operation]
    draws = draws._replace(factors=factors)
    expected = torch.stack([reference_colour(crops[i], draws, i, settings) for i in range(42)])
    ours = colour_views(crops, draws, settings)
    assert (ours - expected).abs().max() < 1e-5
    assert (ours - crops / 255).abs().max() > 0.2


def test_blur_is_torchvisions_with_a_sigma_for_each_sample() -> None:
    crops, settings = pictures(21, 64), unnormalised(64, jitter=0.0, gray=0.0, blur=1.0)
    draws = draw(settings, 21)
    assert len(np.unique(draws.blur_sigma)) == 21
    expected = torch.stack([reference_colour(crops[i], draws, i, settings) for i in range(21)])
    assert (colour_views(crops, draws, settings) - expected).abs().max() < 1e-5


def test_blur_kernel_spans_a_tenth_of_the_view() -> None:
    """23 taps at 224 pixels, as in the authors' code: seen from the spread of one bright dot under a wide sigma."""
    crops, settings = torch.zeros(1, 3, 224, 224, dtype=torch.uint8), unnormalised(224, blur_sigma=(50.0, 50.0))
    crops[:, :, 112, 112] = 255
    draws = draw(replace(settings, blur=1.0, jitter=0.0, gray=0.0), 1)
    touched = colour_views(crops, draws, settings)[0, 0] > 0
    assert touched.any(0).sum() == touched.any(1).sum() == 23


@pytest.mark.parametrize("size", [20, 37, 64])
def test_a_gpus_blur_is_the_cpus(size: int) -> None:
    """By taps of a batch, and by products of a sample: one picture."""
    x, sigma = torch.rand(5, 3, size, size), np.array([2.0, 1.1, 0.7, 0.4, 0.25], dtype=np.float32)
    kernels = colour.half_kernels(sigma, size // 10 // 2)
    taps, reach = torch.from_numpy(kernels)[..., None, None], np.count_nonzero(kernels[:, 1:], axis=1)
    products = x.clone()
    colour._blur(products, taps, reach)
    assert (colour._blur_by_taps(x, taps, reach) - products).abs().max() < 1e-6
    assert (products - x).abs().max() > 0.05


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preset", ["imagenet", "small", "blog"])
def test_colour_is_torchvisions(preset: str, compiled: bool, request: pytest.FixtureRequest) -> None:
    """In units of the normalised view, whose standard deviation is about 1."""
    if compiled:
        request.getfixturevalue("compiler")
    settings = replace(PRESETS[preset], image_size=40)
    crops, draws = pictures(150, 40), draw(settings, 150)
    expected = torch.stack([reference_colour(crops[i], draws, i, settings) for i in range(150)])
    ours = (compile_colour() if compiled else colour_views)(crops, draws, settings)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert (ours - expected).abs().max() < 2e-4
    assert (ours - expected).abs().mean() < 1e-6


@pytest.mark.parametrize("source", ["photos", "cifar10"])
def test_views_of_real_images_are_torchvisions(source: str) -> None:
    """Crops within 1/255 at most and 0.1/255 on average, whole views within 2/255 on average."""
    images = photographs(6) if source == "photos" else cifar(60)
    if not images:
        pytest.skip(f"no images in {PHOTOS.parent}")
    settings = replace(PRESETS["imagenet"], image_size=96) if source == "photos" else PRESETS["small"]
    size, distances = settings.image_size, []
    for index, image in enumerate(images):
        draws = draw(settings, len(images), *image.shape[1:])
        crop = crop_view(image, draws.box[index], bool(draws.flip[index]), size, settings.interpolation)
        plain = draws._replace(
            jitter=np.zeros_like(draws.jitter), gray=np.zeros_like(draws.gray), blur_sigma=draws.blur_sigma * 0
        )
        unit = replace(settings, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        distances.append((crop / 255 - reference_view(image, plain, index, unit)).abs())
        ours = colour_views(crop[None], ViewDraws(*(field[index : index + 1] for field in draws)), settings)[0]
        difference = (ours - reference_view(image, draws, index, settings)) * torch.tensor(settings.std)[:, None, None]
        assert difference.abs().mean() < 2 / 255
    found = torch.stack(distances) * 255
    print(f"{source}: crops differ by {found.max():.2f}/255 at most, {found.mean():.4f}/255 on average")
    assert found.max() < 1.01
    assert found.mean() < 0.1


def photographs(count: int) -> list[Tensor]:
    found = []
    for file in sorted(PHOTOS.glob("*.JPEG"))[:count]:
        with Image.open(file) as opened:
            found.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
    return found


def cifar(count: int) -> list[Tensor]:
    file = PHOTOS.parent / "cifar10" / "test.parquet"
    if not file.exists():
        return []
    found = []
    for image in pq.read_table(file, columns=["img"]).column("img").slice(0, count).to_pylist():
        with Image.open(io.BytesIO(image["bytes"])) as opened:
            found.append(torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1))
    return found


@pytest.mark.parametrize("size", [30, 33, 224])
def test_a_view_has_the_same_bits_in_any_company(size: int) -> None:
    """224: the batch is coloured in several pieces; 30 and 33: no sample starts where the processor would like it."""
    count = 20
    settings = replace(PRESETS["imagenet"], image_size=size)
    crops, draws = pictures(count, size), draw(settings, count)
    together = colour_views(crops, draws, settings)
    for chosen in ([3], [19, 4, 11], list(range(1, 14))):
        part = ViewDraws(*(field[chosen] for field in draws))
        assert torch.equal(colour_views(crops[chosen], part, settings), together[chosen])
    channels_last = crops.contiguous(memory_format=torch.channels_last)
    assert torch.equal(colour_views(channels_last, draws, settings), together)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(colour_views(crops, draws, settings), together)


def test_a_view_without_colour_changes_is_only_normalised() -> None:
    settings = replace(PRESETS["imagenet"], image_size=16, jitter=0.0, gray=0.0, blur=0.0)
    crops = pictures(9, 16)
    before = crops.clone()
    plain = normalise(crops, settings.mean, settings.std)
    assert torch.equal(colour_views(crops, draw(settings, 9), settings), plain)
    expected = tv.normalize(crops / 255, list(settings.mean), list(settings.std))
    assert (plain - expected).abs().max() < 1e-5
    assert plain.is_contiguous()
    assert torch.equal(crops, before)


def test_an_empty_batch_stays_empty() -> None:
    settings = PRESETS["small"]
    crops = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    assert colour_views(crops, draw(settings, 0), settings).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("size", "short", "height", "width"),
    [(224, 256, 300, 401), (224, 256, 500, 260), (96, 110, 64, 64), (32, 32, 48, 37)],
)
def test_eval_view_is_resize_and_centre_crop(size: int, short: int, height: int, width: int) -> None:
    image = pictures(1, 512)[0, :, :height, :width]
    resized = tv.resize(image, [short], InterpolationMode.BICUBIC, antialias=True)
    expected = tv.center_crop(resized, [size, size])
    ours = eval_view(image, size)
    assert ours.shape == (3, size, size)
    assert (ours.int() - expected.int()).abs().max() <= 1


@contextmanager
def more_memory(size: int) -> Iterator[None]:
    """Let this process take no more than `size` bytes of address space beyond what it has."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


@pytest.mark.parametrize(
    ("height", "width"), [(1, 20_000), (20_000, 1), (1, 65_500), (1, 2_000_000), (2_000_000, 1), (8, 60_000)]
)
@pytest.mark.parametrize("size", [32, 224])
def test_a_very_long_image_costs_what_its_pixels_cost(height: int, width: int, size: int) -> None:
    image, whole = torch.full((3, height, width), 7, dtype=torch.uint8), np.array([0, 0, height, width])
    with more_memory(300 << 20):
        for view in (eval_view(image, size), *(crop_view(image, whole, False, size, how) for how in MODES)):
            assert view.shape == (3, size, size)
            assert bool((view == 7).all())


@pytest.mark.parametrize(("height", "width"), [(2, 300), (300, 2), (5, 1000), (1000, 5), (40, 3001)])
def test_what_is_seen_of_a_very_long_image(height: int, width: int) -> None:
    """Its middle, as of one that is resized whole; up to a pixel of the view, as the number of pixels is rounded."""
    ramp = torch.linspace(0, 255, max(height, width)).repeat(3, min(height, width), 1)
    image = (ramp if width > height else ramp.mT).to(torch.uint8)
    scale = 256 / min(height, width)
    resized = tv.resize(image, [int(height * scale), int(width * scale)], InterpolationMode.BICUBIC, antialias=True)
    expected = tv.center_crop(resized, [224, 224])
    assert (eval_view(image, 224).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_very_tall_crop_is_torchvisions(interpolation: str) -> None:
    image = pictures(1, 1200)[0, :, :, :30]
    expected = tv.resize(image, [64, 64], MODES[interpolation], antialias=True)
    ours = crop_view(image, np.array([0, 0, 1200, 30]), False, 64, interpolation)
    assert (ours.int() - expected.int()).abs().float().mean() < 0.5


def test_colouring_never_reads_a_pixel_on_the_host() -> None:
    """A meta tensor has no values: whatever asks for one (a mask's count, an .item()) fails on it."""
    settings = replace(PRESETS["imagenet"], image_size=64)
    crops = torch.empty(40, 3, 64, 64, dtype=torch.uint8, device="meta")
    views = colour_views(crops, draw(settings, 40), settings)
    assert views.shape == (40, 3, 64, 64)
    assert views.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_colours_as_the_cpu_and_never_waits() -> None:
    settings = replace(PRESETS["imagenet"], image_size=96)
    crops, draws = pictures(64, 96), draw(settings, 64)
    on_device = crops.cuda()
    colour_views(on_device, draws, settings)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = colour_views(on_device, draws, settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (ours.cpu() - colour_views(crops, draws, settings)).abs().max() < 2e-4
