"""What the evaluation's tests evaluate: an encoder's card, and images of three classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

CLASSES = ("bright", "dark", "striped")
CARD: dict[str, Any] = {
    "encoder": "resnet10",
    "width": 1,
    "stem": "small_stride2",
    "feature_size": 128,
    "image_size": 16,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "step": 1200,
    "init": "random",
    "data_digest": "0" * 64,
    "config": {"seed": 0},
}


def draw_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 20, 16, 3] of three classes that differ in brightness and in stripes, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = random.normal(128, 40, (n, 20, 16, 3))
    images[labels == 0] += 50
    images[labels == 1] -= 50
    images[labels == 2, ::4] = 250
    return images.clip(0, 255).astype(np.uint8), labels


def scored(probe: Callable[..., Any], train: Any, test_h: torch.Tensor, **how: Any) -> tuple[Any, dict[str, Any]]:
    """The scores of the test rows by a probe that was trained on `train`, and what it says of itself."""
    predict, info = probe(*train, **how)
    return torch.stack([one(test_h) for one in predict]) if isinstance(predict, list) else predict(test_h), info
