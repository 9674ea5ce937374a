"""What a run says of itself."""

import dataclasses

import pytest

from simclr_dist.data.views.draws import PRESETS, ViewSettings
from simclr_dist.train.describe import views_line


def test_views_are_said_in_one_line() -> None:
    assert views_line(dataclasses.replace(PRESETS["small"], image_size=16)) == (
        "16x16 crops of 8-100 % of the area, width/height 0.75-1.33, bicubic; flip 0.5;"
        " jitter 0.8 (brightness 0.4, contrast 0.4, saturation 0.4, hue 0.1); gray 0.2; no blur;"
        " mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616"
    )
    assert "; blur 0.5 (sigma 0.1-2 pixels); " in views_line(PRESETS["imagenet"])
    never = ViewSettings(flip=0, jitter=0, gray=0, blur=0)
    assert "; no flip; no jitter; no gray; no blur; " in views_line(never)


@pytest.mark.parametrize("field", dataclasses.fields(ViewSettings), ids=lambda field: field.name)
def test_no_setting_of_the_views_is_left_unsaid(field: "dataclasses.Field[object]") -> None:
    plain = ViewSettings()
    other = {"image_size": 96, "interpolation": "bilinear", "crop_scale": (0.2, 1.0), "crop_ratio": (0.5, 2.0)}
    other |= {"blur_sigma": (0.2, 2.0), "mean": (0.5, 0.456, 0.406), "std": (0.5, 0.224, 0.225)}
    changed = dataclasses.replace(plain, **{field.name: other.get(field.name, 0.125)})  # type: ignore[arg-type]
    assert changed != plain
    assert views_line(changed) != views_line(plain)
