"""What is copied to a GPU comes from pinned memory: else the host waits for all that the GPU has still to do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from simclr_dist.data.views.colour import to_device
from simclr_dist.evaluate.features import extraction
from simclr_dist.method.dropout import key_random_layers
from simclr_dist.train import learner

GPU = torch.device("cuda", 0)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Copies to the GPU, each as (from pinned memory, without waiting). They stay where they are."""
    pinned: set[int] = set()
    copies: list[tuple[bool, bool]] = []
    plain = Tensor.to

    def pin(self: Tensor) -> Tensor:
        pinned.add(self.data_ptr())
        return self

    def to(self: Tensor, *where: Any, non_blocking: bool = False, **more: Any) -> Tensor:
        if where != (GPU,):
            return plain(self, *where, non_blocking=non_blocking, **more)
        copies.append((self.data_ptr() in pinned, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    return copies


def test_arrays_of_a_step(copied: list[tuple[bool, bool]]) -> None:
    values = np.arange(3)
    assert to_device(values, GPU).tolist() == to_device(values, torch.device("cpu")).tolist() == [0, 1, 2]
    assert copied == [(True, True)]


def test_keys_of_dropout(copied: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    network.keys = key_random_layers(network)
    network.keys.columns = 1

    class Model(nn.Module):
        encoder = network

        def parameters(self, recurse: bool = True) -> Any:
            return iter([type("OnGpu", (), {"device": GPU})()])

    model: Any = Model()
    with learner.keyed(model, 0, 0, torch.arange(5)):
        assert network.keys.of_images.shape == (10, 1)
    assert copied == [(True, True)]


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), (GPU, True), ("cpu", False)])
def test_images_that_are_evaluated(monkeypatch: pytest.MonkeyPatch, device: Any, expected: bool) -> None:
    class Asked(Exception):
        pass

    def loader(*_: Any, pin_memory: bool, **__: Any) -> Any:
        raise Asked(pin_memory)

    monkeypatch.setattr(extraction, "Loader", loader)
    with pytest.raises(Asked, match=str(expected)):
        extraction.extract([None], {}, {"image_size": 8}, pixels=True, device=device)  # type: ignore[arg-type]
