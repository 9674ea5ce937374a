"""Settings of images that are not 8-bit RGB: what must be set beside them, and what has no effect."""

from pathlib import Path

import pytest

from simclr_dist.config.load import load_config
from simclr_dist.system.errors import ConfigError

GRAY = "run_folder: runs/x\nsteps: 20\ndata: {shards: data/x, channels: 1}\n"
SCALED = "views: {mean: [0.5], std: [0.2]}\n"
MEASURE = "`simclr-dist shard --statistics data/x` measures it"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.yaml"


def test_gray_images_of_16_bits_are_settings_like_others(file: Path) -> None:
    file.write_text(GRAY + SCALED)
    config = load_config(file, ["--data.bit_depth", "16", "--views.rotate", "0.75", "--views.brightness", "0.2"])
    assert config.data.kind == (1, 16)
    assert (config.views.mean, config.views.rotate) == ((0.5,), 0.75)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (GRAY, f"views.mean: None must be set, one number for each of data.channels: 1; {MEASURE}"),
        (
            GRAY + "views: {mean: [0.5, 0.5], std: [0.2]}\n",
            f"views.mean: (0.5, 0.5) must have one number for each of data.channels: 1; {MEASURE}",
        ),
        (GRAY + "views: {mean: [0.5]}\n", f"views.std: None must be set, one number for each of data.channels: 1; {MEASURE}"),
        (GRAY + "views: {mean: [0.5], std: [0]}\n", "views.std: (0.0,) must be above 0"),
        (GRAY + "views: {mean: 0.5}\n", "views.mean: 0.5 is not a list of numbers"),
        (GRAY + "views: {mean: []}\n", "views.mean: [] is not a list of numbers"),
        (
            GRAY + "views: {mean: [0.5], std: [0.2], hue: 0.1}\n",
            "views.hue: 0.1 has no effect with data.channels: 1, as there is no colour; leave it out",
        ),
        (GRAY.replace("1", "0", 1), "data.channels: 0 must be at least 1 and at most 64"),
        (GRAY.replace("channels: 1", "bit_depth: 12"), "data.bit_depth: 12 is not one of 8, 16"),
        (GRAY.replace("channels: 1", "x: 1"), "data.x: unknown key"),
        (GRAY + "views: {mean: [0.5], std: [0.2], rotate: 2}\n", "views.rotate: 2.0 is not a probability from 0 to 1"),
    ],
)
def test_what_does_not_go_with_the_channels_is_refused(file: Path, text: str, line: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert str(refused.value) == f"{file}: {line}"


def test_a_preset_of_colours_goes_with_gray_images(file: Path) -> None:
    """Its hue and gray are off; `0` may be said."""
    file.write_text(GRAY + "views: {preset: imagenet, mean: [0.5], std: [0.2], hue: 0}\n")
    assert load_config(file).views.hue == 0
