"""The training step as it is on CUDA, on fake tensors: devices agree, types are as meant, and nothing waits for the device."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from fake_cuda import DEVICE, Launches, _backward, fake_cuda
from host_sync import NoSync
from simclr_dist.config.settings import Config, LossConfig, ModelConfig, OptimConfig, ViewsConfig
from simclr_dist.data.steps import Portion, Views, coloured
from simclr_dist.data.views import colour_cuda
from simclr_dist.data.views.colour import colour_views
from simclr_dist.data.views.draws import draw_views
from simclr_dist.method.batch_norm import GlobalBatchNorm
from simclr_dist.method.distributed import World
from simclr_dist.method.loss import fused
from simclr_dist.method.optim import learning_rate
from simclr_dist.train import images
from simclr_dist.train.describe import view_settings
from simclr_dist.train.learner import build_learner
from simclr_dist.train.loop import training_step

CONFIG = Config(
    global_batch_size=8,
    steps=4,
    precision="fp32",
    model=ModelConfig(encoder="resnet10", projector_hidden=32, projector_dim=16),
    views=ViewsConfig(image_size=64, solarize=0.5),
    optim=OptimConfig(name="lars", clip_norm=1.0),
)


def _views(config: Config) -> Views:
    """What the workers send: crops on the host, and draws."""
    settings = view_settings(config)
    pieces, size = config.micro_batches, settings.image_size
    n = config.global_batch_size // pieces
    portions = []
    for rows in np.arange(config.global_batch_size).reshape(pieces, n):
        sides = np.full(n, 80)
        draws = [draw_views(settings, seed=0, epoch=0, rows=rows, view=v, heights=sides, widths=sides) for v in (0, 1)]
        crops = [torch.zeros(n, config.data.channels, size, size, dtype=torch.uint8) for _ in range(2)]
        portions.append(Portion(0, (crops[0], crops[1]), (draws[0], draws[1]), torch.from_numpy(rows), []))
    return Views(0, [[portion] for portion in portions])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"micro_batches": 2, "precision": "bf16"},
        {"micro_batches": 2, "activation_checkpointing": True},
        {"optim": OptimConfig(name="adamw")},
        {"optim": OptimConfig(name="muon")},
        {"optim": OptimConfig(name="sgd")},
        {"loss": LossConfig(decoupled=True, scale=2)},
        {"model": dataclasses.replace(CONFIG.model, projector_dim=512)},  # wider than the kernels take: tiles
        {
            "model": dataclasses.replace(CONFIG.model, encoder="timm/vit_tiny_patch16_224", drop_path=0.1),
            "views": ViewsConfig(),
        },
    ],
    ids=["fp32", "bf16", "fp16", "pieces", "checkpointed", "adamw", "muon", "sgd", "decoupled", "wide", "vit"],
)
def test_a_step(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    if config.model.encoder.startswith("timm/"):
        pytest.importorskip("timm")
    views = _views(config)
    rows = views.rows_of_each
    with fake_cuda() as launched:
        learner = build_learner(config, World(0, 1, 0, DEVICE))
        with NoSync():
            for step in range(2):  # the second has the optimizer's buffers
                launched.clear()
                kernels = {"colour": colour_cuda.colour_views} if step else {}
                micro_batches = coloured(views, view_settings(config), DEVICE, timed=learner.local_timer, **kernels)
                assert {(view.device, view.dtype) for pair in micro_batches for view in pair} == {(DEVICE, torch.float32)}
                lr = learning_rate(step, peak=config.peak_lr, warmup_steps=1, total_steps=4)
                outcome = training_step(learner, micro_batches, config, lr, rows=rows, step=step)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
        assert {name: value.dtype for name, value in outcome.items()} == {
            "loss": torch.float32, "gradient_norm": torch.float32, "z_a": half, "z_b": half,
        }  # fmt: skip
        assert {value.device for value in outcome.values()} == {DEVICE}
        for parameter in learner.model.parameters():
            assert parameter.grad is not None
            assert (parameter.device, parameter.dtype, parameter.grad.stride()) == (DEVICE, torch.float32, parameter.stride())
        of_host = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), learner.optimizer.state_dict())
        learner.optimizer.load_state_dict(of_host)  # as a checkpoint has it
        learner.optimizer.step()
        state = [value for of in learner.optimizer.state.values() for value in of.values()]
        assert {tensor.device for tensor in [*learner.model.buffers(), *learner.counters.values(), *state]} == {DEVICE}
    wide = config.model.projector_dim > 256
    assert launched.count(colour_cuda._colour) == 4 * len(views.portions), "two a view"
    others = [kernel for kernel in launched if kernel not in (colour_cuda._colour, colour_cuda._blur)]
    assert others == ([] if wide else [fused._log_sum_exp, fused._weighted_sum])


def test_what_a_step_adds_is_few_launches() -> None:
    """Running statistics are kept and restored all at once; each had three launches, and a ResNet-50 has 106."""
    views = _views(CONFIG)
    with fake_cuda():
        learner = build_learner(CONFIG, World(0, 1, 0, DEVICE))
        micro_batches = coloured(views, view_settings(CONFIG), DEVICE)
        with Launches() as launches:
            training_step(learner, micro_batches, CONFIG, 0.1, rows=views.rows_of_each)
    assert sum("running" in name for name, _ in learner.model.named_buffers()) > 20
    assert launches.names.count("_foreach_copy_") == 1
    assert launches.names.count("where") < 5, "of all statistics, of the trust ratios, and of the scale"


def test_what_colours_views_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on CUDA; plain operations where Triton cannot compile, and on CPUs."""
    for device, problem, expected in (
        ("cuda", "", colour_cuda.colour_views),
        ("cuda", "Triton cannot compile: gcc fails", colour_views),
        ("cpu", "not asked", colour_views),
    ):
        monkeypatch.setattr(images, "triton_problem", lambda device, problem=problem: problem)
        assert images.choose_colour(CONFIG, torch.device(device)) is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_batch_norm_over_two_ranks_waits_for_nobody(dtype: torch.dtype) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with fake_cuda():
            x = torch.zeros(4, 8, 5, 5, device="cuda", dtype=dtype, requires_grad=True)
            norm = GlobalBatchNorm(8).to(DEVICE)
            with NoSync():
                y = norm(x)
                y.sum().backward()
            assert (y.device, y.dtype) == (DEVICE, dtype)
            assert norm.running_mean is not None
            assert norm.weight.grad is not None
            assert (norm.running_mean.device, norm.weight.grad.device) == (DEVICE, DEVICE)
    finally:
        torch.distributed.destroy_process_group()


def _mixed(x: torch.Tensor) -> None:
    (x.float() @ torch.zeros(2, 2)).sum()


def _gradient_on_the_host(x: torch.Tensor) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return torch.zeros(2, 2)

    Wrong.apply(x).sum().backward()


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool(x.sum() > 0),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.zeros(2, 2).copy_(x),
        _mixed,
        _gradient_on_the_host,
    ],
    ids=["item", "float", "bool", "cpu", "nonzero", "mask", "copy", "mixed", "gradient"],
)
def test_what_it_sees(fault: Any) -> None:
    with fake_cuda():
        x = torch.zeros(2, 2, device="cuda", requires_grad=True)
        with NoSync(), pytest.raises((AssertionError, RuntimeError), match=r"a host sync|a copy from the device|device"):
            fault(x)


def test_gradients_are_those_of_the_engine() -> None:
    """The stand-in for the engine, on tensors that have values."""
    x = torch.randn(5, 3, requires_grad=True)
    layer = nn.Linear(3, 3)
    y = layer(x)
    z = ((y * y.exp()).sum(0) / y.relu().sum() + layer.weight.sum(0)).square().sum()
    expected = torch.autograd.grad(z, (x, y, *layer.parameters()), retain_graph=True)
    found = _backward((z,), (torch.ones(()),), True, False, (x, y, *layer.parameters()), accumulate_grad=False)
    torch.testing.assert_close(found, expected)
    _backward((z,), (torch.ones(()),), True, False)
    torch.testing.assert_close([x.grad, *(p.grad for p in layer.parameters())], [expected[0], *expected[2:]])
