"""Build the learner: model, gradient exchange, optimizer. Compute its gradient and its numbers."""

import contextlib
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simclr_dist.config.settings import Config
from simclr_dist.encoder.file import start_weights
from simclr_dist.method.distributed import World, all_equal, data_parallel, together
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.method.loss.statistics import embedding_statistics
from simclr_dist.method.microbatch import LossFunction, contrastive_backward
from simclr_dist.method.model import SimCLR, build_simclr, frozen_running_statistics, use_global_batch_norm
from simclr_dist.method.optim import build_optimizer, parameter_groups
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.monitor import Stopwatch

MicroBatch = tuple[Tensor, Tensor]
"""View a and view b of this rank's images in it, float [n, 3, s, s]."""


class LossScale:
    """A factor on float16's loss; without it gradients vanish. Halved by an overflow, doubled after 2000 steps without."""

    def __init__(self, device: torch.device) -> None:  # device scalars: no step waits for the host
        self.factor = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds."""
        return {"factor": float(self.factor), "good_steps": int(self.good_steps)}

    def restore(self, state: Mapping[str, float]) -> None:
        """Restore what `state` has returned."""
        self.factor.fill_(state["factor"])
        self.good_steps.fill_(state["good_steps"])

    def unscale(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Divide the gradients in place; return the loss divided."""
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.factor)
        return loss / self.factor

    def update(self, bad: Tensor) -> None:
        """Adapt the factor to a step that was `bad` (bool) or not."""
        torch._amp_update_scale_(self.factor, self.good_steps, bad.float(), 2.0, 0.5, 2000)


@dataclass
class Learner:
    """All that a training step changes."""

    model: SimCLR
    parallel: nn.Module  # DDP around the model, or the model itself
    optimizer: torch.optim.Optimizer
    loss: LossFunction
    loss_scale: LossScale | None  # of fp16
    counters: dict[str, Tensor]  # int64 device scalars
    init: str  # what the encoder really started from
    local_timer: Stopwatch  # of work that waits for no other rank

    def count_step(self, loss: Tensor, bad: Tensor, clipped: Tensor) -> None:
        """Count a step and adapt the loss scale. `bad`: the step was skipped. All arguments are device scalars."""
        hopeless = bad  # unlike a step whose gradient overflowed only because of the scale
        if self.loss_scale:
            hopeless = bad & (~loss.isfinite() | (self.loss_scale.factor <= 1))
            self.loss_scale.update(bad)
        counters = self.counters
        counters["skipped"] += bad
        counters["clipped"] += clipped & ~bad
        counters["skipped_in_a_row"].add_(1).mul_(hopeless)
        counters["longest_skip"] = torch.maximum(counters["longest_skip"], counters["skipped_in_a_row"])


def build_learner(config: Config, world: World) -> Learner:
    """Build model, DDP and optimizer, the same on every rank."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; who wants speed takes bf16
    torch.manual_seed(config.seed)
    m, o = config.model, config.optim
    model = build_simclr(**m.shape)
    init = together(lambda: start_weights(model.encoder, m.encoder, m.init, m.init_file))
    if not all_equal(init):
        raise ConfigError("model.init: some ranks could load the start weights and others could not; put them on every node")
    model.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    model.to(world.device, torch.float64 if config.precision == "fp64" else torch.float32)
    model.encoder.checkpointing = config.activation_checkpointing
    model.channels_last = config.channels_last
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    use_global_batch_norm(model, world.device)
    groups = parameter_groups(model, o.weight_decay)
    optimizer = build_optimizer(o.name, groups, lr=config.peak_lr, momentum=o.momentum, trust_coefficient=o.trust_coefficient)
    if config.compile:
        model.encoder.compile()
    parallel = data_parallel(model, world, in_rank_order=world.device.type == "cpu" or config.deterministic)
    counted = ("skipped", "skipped_in_a_row", "longest_skip", "clipped")
    counters = {name: torch.zeros((), dtype=torch.int64, device=world.device) for name in counted}
    loss = NTXentLoss(config.loss.temperature, decoupled=config.loss.decoupled, scale=config.loss.scale)
    loss_scale = LossScale(world.device) if config.precision == "fp16" else None
    return Learner(model, parallel, optimizer, loss, loss_scale, counters, init, Stopwatch(world.device))


def cut(view_a: Tensor, view_b: Tensor, count: int) -> list[MicroBatch]:
    """Cut this rank's views, float [n, 3, s, s], into `count` micro-batches."""
    return list(zip(view_a.chunk(count), view_b.chunk(count), strict=True))


def backward(
    learner: Learner, micro_batches: Sequence[MicroBatch], loss_function: LossFunction | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of the global batch's loss. It carries fp16's scale. Returns (that loss, z_a, z_b)."""
    plain = loss_function or learner.loss
    scale = learner.loss_scale
    return contrastive_backward(
        learner.parallel,
        micro_batches,
        plain if scale is None else lambda z_a, z_b: plain(z_a, z_b) * scale.factor,
        no_sync=getattr(learner.parallel, "no_sync", contextlib.nullcontext),
        first_pass=functools.partial(frozen_running_statistics, learner.model),
    )


def step_metrics(
    outcome: dict[str, Tensor], learner: Learner, config: Config, step: int, lr: float, bad_samples: int
) -> dict[str, float]:
    """Compute the numbers to log after a step, on every rank alike.

    Each is a function of the run's state alone, so a resumed run repeats them. The loss is without `loss.scale`.
    """
    negatives = 2 * (config.global_batch_size - 1)
    counters = {name: int(value) for name, value in learner.counters.items()}
    metrics = {
        f"loss/{'dcl' if config.loss.decoupled else 'nt_xent'}": float(outcome["loss"]) / config.loss.scale,
        "loss/chance": math.log(negatives + (not config.loss.decoupled)) if negatives else 0.0,
        "loss/negatives_an_anchor": negatives,
        **embedding_statistics(outcome["z_a"], outcome["z_b"]),
        "optim/learning_rate": lr,
        "optim/gradient_norm": float(outcome["gradient_norm"]),
        "optim/clipped_share": counters["clipped"] / step,
        "optim/skipped_steps": counters["skipped"],
        "optim/longest_skip": counters["longest_skip"],
        "data/bad_samples": bad_samples,
    }
    if trust := getattr(learner.optimizer, "trust_ratios", None):
        ratios = torch.cat(trust)
        least, middle, most = torch.stack([ratios.min(), ratios.median(), ratios.max()]).tolist()
        metrics |= {"lars/trust_ratio_min": least, "lars/trust_ratio_median": middle, "lars/trust_ratio_max": most}
    if learner.loss_scale:
        metrics["optim/loss_scale"] = float(learner.loss_scale.factor)
    return metrics
