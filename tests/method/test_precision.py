"""fp32 means float32's digits in every verb; TF32 and bf16 are had where they are named and the device has them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from simclr_dist.config.settings import Config
from simclr_dist.encoder.features import features
from simclr_dist.evaluate.features.extraction import in_precision
from simclr_dist.method.distributed import World
from simclr_dist.method.precision import computing, settle
from simclr_dist.preflight.check import machines
from simclr_dist.system.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _as_torch_starts() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")


class _Encoder(nn.Module):
    """Returns whether convolutions may round to TF32, and whether autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.card = {"feature_size": 2, "image_size": 4, "mean": [0.5] * 3, "std": [0.5] * 3}

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([[torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")]]).float().expand(len(x), 2)


@pytest.mark.parametrize("card", [(8, 0)], indirect=True)
@pytest.mark.usefixtures("card")
def test_convolutions_keep_float32_unless_tf32_is_named() -> None:
    x = torch.zeros(1, 3, 4, 4)
    for precision, device, expected in (
        ("fp32", GPU, [0, 0]),
        ("tf32", GPU, [1, 0]),
        ("fp32", CPU, [0, 0]),
        ("bf16", CPU, [0, 1]),
    ):
        assert in_precision(_Encoder(), precision, device)(x).tolist() == [expected], (precision, device)
        assert torch.backends.cudnn.allow_tf32, "what surrounds an encoder's forward is not ours"
    assert features(_Encoder(), torch.zeros(3, 4, 4, dtype=torch.uint8)).tolist() == [0, 0]
    with pytest.raises(ZeroDivisionError), computing("fp32", GPU):
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "bf16", "fp16", "fp64"):  # a training is a process of its own
        torch.backends.cudnn.allow_tf32 = True
        settle(precision, GPU)
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("card", [(7, 0), (7, 5)], indirect=True)
@pytest.mark.usefixtures("card")
def test_a_device_without_it_refuses_it() -> None:
    for precision in ("tf32", "bf16"):
        line = rf"^precision: {precision}: Tesla T4 is older .* has none; take fp32, or fp16 for training$"
        with pytest.raises(ConfigError, match=line):
            settle(precision, GPU)
    with pytest.raises(ConfigError, match=r"^precision: tf32: cpu has no TF32; take fp32$"):
        in_precision(_Encoder(), "tf32", CPU)
    for precision, device in (("fp16", GPU), ("fp32", GPU), ("fp64", GPU), ("bf16", CPU)):
        settle(precision, device)
    [finding] = machines.precision(Config(precision="bf16"), World(0, 1, 0, GPU))
    assert finding.level == "failure"
    assert "precision: bf16: Tesla T4 is older" in finding.seen
    assert machines.precision(Config(precision="fp16"), World(0, 1, 0, GPU)) == []
