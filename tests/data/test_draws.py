"""The draws: the published generator, purity, and torchvision's distributions."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import ColorJitter, RandomResizedCrop

from simclr_dist.data.views.draws import PRESETS, ViewDraws, ViewSettings, draw_views, philox4x32, uniforms

N = 5000
# Two samples of 5000 from one distribution exceed this distance once in 1000 times.
KS_LIMIT = 1.95 * np.sqrt(2 / N)


def draw(settings: ViewSettings, rows: NDArray[np.int64], seed: int = 0, epoch: int = 0, view: int = 0) -> ViewDraws:
    heights, widths = 100 + rows % 300, 80 + rows % 411
    return draw_views(settings, seed=seed, epoch=epoch, rows=rows, view=view, heights=heights, widths=widths)


def ks_distance(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    at = np.sort(np.concatenate([ours, theirs]))
    share = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (ours, theirs)]
    return float(np.abs(share[0] - share[1]).max())


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    assert philox4x32(np.array(counter, dtype=np.uint64), key).tolist() == words


def test_uniforms_have_golden_values() -> None:
    """A change of these changes every run, so it may not happen by accident."""
    words = philox4x32(np.array([[3, 7, 1, 0], [3, 7, 1, 1]], dtype=np.uint64), (5, 9)).ravel()
    assert (uniforms(5 + (9 << 32), 3, [7], 1, 6)[0] == words[:6] / 2**32).all()
    assert uniforms(0, 0, [0], 0, 1)[0, 0] == 0x6627E8D5 / 2**32


def test_draws_have_golden_values() -> None:
    draws = draw_views(PRESETS["imagenet"], seed=2**40 + 1, epoch=3, rows=[7, 8], view=1, heights=[375, 300], widths=[500, 40])
    assert draws.box.tolist() == [[1, 7, 374, 460], [188, 0, 36, 40]]
    assert draws.order.tolist() == [[0, 1, 2, 3], [2, 1, 3, 0]]
    assert (draws.flip.tolist(), draws.jitter.tolist(), draws.gray.tolist()) == ([True, False], [False, True], [False] * 2)
    factors = [[0.41297337, 0.56400496, 1.7344475, 0.10637802], [1.5672523, 0.24895705, 1.6049347, 0.15373534]]
    np.testing.assert_allclose(draws.factors, factors, rtol=1e-6)
    np.testing.assert_allclose(draws.blur_sigma, [0.22609332, 1.0855892], rtol=1e-6)


def test_every_bit_of_the_key_matters() -> None:
    base = uniforms(1, 2, [3], 4, 64)
    others = [
        uniforms(1 + 2**40, 2, [3], 4, 64),
        uniforms(2, 2, [3], 4, 64),
        uniforms(1, 3, [3], 4, 64),
        uniforms(1, 2, [2**32 - 1], 4, 64),
        uniforms(1, 2, [3], 5, 64),
        uniforms(1, 3, [2], 4, 64),
    ]
    everything = np.concatenate([base, *others])
    assert len(np.unique(everything)) == everything.size


def test_uniforms_are_uniform_and_uncorrelated_between_neighbours() -> None:
    u = uniforms(0, 0, np.arange(N), 0, 8)
    assert u.min() >= 0
    assert u.max() < 1
    grid = (np.arange(N) + 0.5) / N
    assert max(ks_distance(u[:, slot], grid) for slot in range(8)) < KS_LIMIT
    neighbours = np.corrcoef(np.concatenate([u[:-1], u[1:], uniforms(0, 0, np.arange(N - 1), 1, 8)], axis=1).T)
    assert np.abs(neighbours - np.eye(24)).max() < 5 / np.sqrt(N)


@pytest.mark.parametrize("rows", [[2**32], [-1]])
def test_a_row_beyond_32_bits_is_refused(rows: list[int]) -> None:
    with pytest.raises(AssertionError):
        uniforms(0, 0, rows, 0, 4)


def test_a_row_is_drawn_alike_in_any_company() -> None:
    rows = np.array([5, 901, 17, 4_000_000_000, 2])
    together = draw(PRESETS["imagenet"], rows)
    for place, row in enumerate(rows):
        alone = draw(PRESETS["imagenet"], np.array([row]))
        for name in ViewDraws._fields:
            assert (getattr(alone, name)[0] == getattr(together, name)[place]).all(), name


@pytest.mark.parametrize("other", [{"view": 1}, {"epoch": 1}, {"seed": 1}, {"seed": 2**32}])
def test_views_epochs_and_seeds_differ(other: dict[str, int]) -> None:
    rows = np.arange(200)
    one, two = draw(PRESETS["imagenet"], rows), draw(PRESETS["imagenet"], rows, **other)
    assert ((one.box != two.box).any(axis=1)).mean() > 0.95
    assert ((one.factors != two.factors).any(axis=1)).mean() > 0.99
    for name in ("flip", "jitter", "gray"):
        assert 0.1 < (getattr(one, name) != getattr(two, name)).mean() < 0.7, name


def test_a_setting_moves_only_its_own_draw() -> None:
    rows = np.arange(300)
    base = draw(PRESETS["imagenet"], rows)
    changed = draw(replace(PRESETS["imagenet"], blur=0.0, jitter=0.3, hue=0.1, crop_scale=(0.5, 1.0)), rows)
    for name in ("flip", "order", "gray"):
        assert (getattr(base, name) == getattr(changed, name)).all()
    assert (base.factors[:, :3] == changed.factors[:, :3]).all()
    np.testing.assert_allclose(changed.factors[:, 3] * 2, base.factors[:, 3], rtol=1e-6)
    assert (changed.blur_sigma == 0).all()
    assert (changed.jitter <= base.jitter).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (300, 40)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """The last size needs the fall-back in most cases: most boxes of an allowed ratio are too wide for it."""
    settings = ViewSettings()
    box = draw_views(settings, seed=0, epoch=0, rows=np.arange(N), view=0, heights=[height] * N, widths=[width] * N).box.astype(
        np.float64
    )
    assert (box[:, :2] >= 0).all()
    assert (box[:, 2:] >= 1).all()
    assert (box[:, 0] + box[:, 2] <= height).all()
    assert (box[:, 1] + box[:, 3] <= width).all()

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    scale, ratio = list(settings.crop_scale), list(settings.crop_ratio)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(N)], dtype=np.float64)
    for measure in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] / np.maximum(1, height - b[:, 2]),
        lambda b: b[:, 1] / np.maximum(1, width - b[:, 3]),
    ):
        assert ks_distance(measure(box), measure(theirs)) < KS_LIMIT
    small = box[(box[:, 2] < height / 2) & (box[:, 3] < width / 2)]
    if len(small) > 500:
        place = small[:, :2] / ([height, width] - small[:, 2:])
        assert abs(np.corrcoef(place.T)[0, 1]) < 4 / np.sqrt(len(small))


@pytest.mark.parametrize(("height", "width"), [(1000, 25), (25, 1000), (10, 10), (1, 1)])
def test_the_crop_that_never_fits_is_torchvisions_central_one(height: int, width: int) -> None:
    settings = ViewSettings(crop_scale=(1.0, 1.0), crop_ratio=(0.9, 0.95))
    box = draw_views(settings, seed=0, epoch=0, rows=[1], view=0, heights=[height], widths=[width]).box[0]
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [0.9, 0.95])
    assert box.tolist() == list(expected)


def test_no_crop_is_empty() -> None:
    settings = ViewSettings(crop_ratio=(0.05, 0.1))
    draws = draw_views(settings, seed=0, epoch=0, rows=np.arange(9), view=0, heights=[1, 4, 9] * 3, widths=[4] * 9)
    assert draws.box[:, 2:].min() == 1
    assert (draws.box[:, :2] + draws.box[:, 2:] <= [[1, 4], [4, 4], [9, 4]] * 3).all()


def test_jitter_factors_and_orders_are_distributed_as_torchvisions() -> None:
    settings = ViewSettings(brightness=1.5)
    ours = draw(settings, np.arange(N))
    jitter = ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue)
    torch.manual_seed(0)
    drawn = [ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(N)]
    for slot in range(4):
        theirs = np.array([parameters[slot + 1] for parameters in drawn])
        assert ks_distance(ours.factors[:, slot].astype(np.float64), theirs) < KS_LIMIT
        assert abs(ours.factors[:, slot].mean() - theirs.mean()) < 4 * theirs.std() * np.sqrt(2 / N)
    assert ours.factors[:, 0].min() >= 0
    orders, counts = np.unique(ours.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert (np.sort(ours.order, axis=1) == np.arange(4)).all()
    assert ((counts - N / 24) ** 2 / (N / 24)).sum() < 49.7, "chi square of 23 degrees of freedom, p = .001"


def test_decisions_come_at_their_rates_and_independently() -> None:
    ours = draw(PRESETS["imagenet"], np.arange(N))
    decisions = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur_sigma": 0.5}
    happened = {name: getattr(ours, name) > 0 for name in decisions}
    for name, rate in decisions.items():
        assert abs(happened[name].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / N), name
    correlation = np.corrcoef([*happened.values(), ours.factors[:, 0], ours.box[:, 2]])
    assert np.abs(correlation - np.eye(6)).max() < 5 / np.sqrt(N)
    sigma = ours.blur_sigma[ours.blur_sigma > 0].astype(np.float64)
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2
    assert ks_distance(sigma, np.linspace(0.1, 2, N)) < KS_LIMIT * np.sqrt(1.5)


def test_probabilities_0_and_1_are_certain() -> None:
    never = draw(replace(PRESETS["imagenet"], flip=0.0, jitter=0.0, gray=0.0, blur=0.0), np.arange(N))
    always = draw(replace(PRESETS["imagenet"], flip=1.0, jitter=1.0, gray=1.0, blur=1.0), np.arange(N))
    for name in ("flip", "jitter", "gray", "blur_sigma"):
        assert not getattr(never, name).any()
        assert getattr(always, name).all()


def test_presets_hold_the_published_strengths() -> None:
    def strengths(name: str) -> tuple[float, ...]:
        s = PRESETS[name]
        return (s.brightness, s.contrast, s.saturation, s.hue, s.jitter, s.gray, s.blur, *s.crop_scale, s.image_size)

    assert strengths("imagenet") == (0.8, 0.8, 0.8, 0.2, 0.8, 0.2, 0.5, 0.08, 1.0, 224)
    assert strengths("small") == (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.0, 0.08, 1.0, 32)
    assert strengths("blog") == (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.0, 0.08, 1.0, 224)
    assert {s.interpolation for s in PRESETS.values()} == {"bicubic"}


@pytest.mark.parametrize(
    "wrong", [{"hue": 0.6}, {"flip": 1.1}, {"crop_scale": (0.5, 0.2)}, {"blur_sigma": (0.0, 1.0)}, {"image_size": 0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        replace(PRESETS["imagenet"], **wrong)


def test_drawing_needs_no_torch() -> None:
    code = "import sys, simclr_dist.data.views.draws; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
