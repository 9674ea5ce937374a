"""What learns: model, gradient exchange and optimizer, and the step that changes them."""

import contextlib
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from simclr_dist.config.settings import Config
from simclr_dist.encoder.file import start_weights
from simclr_dist.method.distributed import World, all_gather_objects, data_parallel, together
from simclr_dist.method.loss import NTXentLoss
from simclr_dist.method.loss.statistics import embedding_statistics
from simclr_dist.method.microbatch import LossFunction, contrastive_backward
from simclr_dist.method.model import SimCLR, build_simclr, frozen_running_statistics, use_global_batch_norm
from simclr_dist.method.optim import build_optimizer, parameter_groups, step_unless
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.monitor import Stopwatch

Piece = tuple[Tensor, Tensor]
"""A micro-batch: view a and view b of this rank's images in it, float [n, 3, s, s]."""


@dataclass
class Learner:
    """All that a training step changes."""

    model: SimCLR
    parallel: nn.Module  # DDP around the model, or the model itself
    optimizer: torch.optim.Optimizer
    loss: LossFunction
    loss_scale: "LossScale | None"  # of fp16
    counters: dict[str, Tensor]  # int64 device scalars
    init: str  # what the encoder really started from
    own_work: Stopwatch  # on what waits for no other rank


class LossScale:
    """What float16's gradients are multiplied by, so as not to vanish: halved by an overflow, doubled after 2000 steps without.

    Two device scalars, so that no step waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.factor = torch.full((), 2.0**16, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, bad: Tensor) -> None:
        """After a step, which was `bad` (bool) or not."""
        torch._amp_update_scale_(self.factor, self.good_steps, bad.float(), 2.0, 0.5, 2000)


def build_learner(config: Config, here: World) -> Learner:
    """Model, DDP and optimizer, the same on every rank."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; who wants speed takes bf16
    torch.manual_seed(config.seed)
    m = config.model
    model = build_simclr(**m.shape)
    init = together(lambda: start_weights(model.encoder, m.encoder, m.init, m.init_file))
    if len(set(all_gather_objects(init))) > 1:
        raise ConfigError("model.init: some ranks could load the start weights and others could not; put them on every node")
    model.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    model.to(here.device, torch.float64 if config.precision == "fp64" else torch.float32)
    model.encoder.checkpointing = config.activation_checkpointing
    model.channels_last = config.channels_last
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    use_global_batch_norm(model, here.device)
    optimizer = build_optimizer(
        config.optim.name,
        parameter_groups(model, config.optim.weight_decay),
        lr=config.peak_lr,
        momentum=config.optim.momentum,
        trust_coefficient=config.optim.trust_coefficient,
    )
    if config.compile:
        model.encoder.compile()
    parallel = data_parallel(model, here, in_rank_order=here.device.type == "cpu" or config.deterministic)
    counters = {
        name: torch.zeros((), dtype=torch.int64, device=here.device)
        for name in ("skipped", "skipped_in_a_row", "longest_skip", "clipped")
    }
    loss = NTXentLoss(config.loss.temperature, decoupled=config.loss.decoupled, scale=config.loss.scale)
    loss_scale = LossScale(here.device) if config.precision == "fp16" else None
    return Learner(model, parallel, optimizer, loss, loss_scale, counters, init, Stopwatch(here.device))


def cut(view_a: Tensor, view_b: Tensor, pieces: int) -> list[Piece]:
    """This rank's views, float [n, 3, s, s], as `pieces` micro-batches."""
    return list(zip(view_a.chunk(pieces), view_b.chunk(pieces), strict=True))


def backward(
    learner: Learner, pieces: Sequence[Piece], loss_function: LossFunction | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the global batch's loss, from this rank's micro-batches; returns (global loss, z_a, z_b).

    With fp16 both are multiplied by the loss scale.
    """
    plain = loss_function or learner.loss
    scale = learner.loss_scale
    return contrastive_backward(
        learner.parallel,
        pieces,
        plain if scale is None else lambda z_a, z_b: plain(z_a, z_b) * scale.factor,
        no_sync=getattr(learner.parallel, "no_sync", contextlib.nullcontext),
        first_pass=functools.partial(frozen_running_statistics, learner.model),
    )


def training_step(learner: Learner, pieces: Sequence[Piece], config: Config, lr: float) -> dict[str, Tensor]:
    """One update of the parameters by this rank's micro-batches, or none when loss or gradient is not finite.

    No host sync of ours (torch's SyncBatchNorm has one).
    All ranks decide alike: the loss is the global one and the gradient is already averaged.
    """
    optimizer, counters = learner.optimizer, learner.counters
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    statistics = [buffer for buffer in learner.model.buffers() if buffer.is_floating_point()]
    before = [buffer.clone() for buffer in statistics]
    loss, z_a, z_b = backward(learner, pieces)
    with learner.own_work, record_function("optimizer"):
        if scale := learner.loss_scale:
            loss = loss / scale.factor
            torch._foreach_div_([p.grad for p in learner.model.parameters() if p.grad is not None], scale.factor)
        clip_norm = config.optim.clip_norm or torch.inf
        norm = nn.utils.clip_grad_norm_(learner.model.parameters(), clip_norm)
        bad = ~(loss.isfinite() & norm.isfinite())
        step_unless(optimizer, bad)
        for buffer, old in zip(statistics, before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))  # a non-finite batch must not stay in the running statistics
        hopeless = bad  # unlike a step whose gradient only overflowed for its scale
        if scale:
            hopeless = bad & (~loss.isfinite() | (scale.factor <= 1))
            scale.update(bad)
        counters["skipped"] += bad
        counters["clipped"] += (norm > clip_norm) & ~bad
        counters["skipped_in_a_row"].add_(1).mul_(hopeless)
        counters["longest_skip"] = torch.maximum(counters["longest_skip"], counters["skipped_in_a_row"])
    return {"loss": loss, "gradient_norm": norm, "z_a": z_a, "z_b": z_b}


def step_metrics(
    outcome: dict[str, Tensor], learner: Learner, config: Config, step: int, lr: float, bad_samples: int
) -> dict[str, float]:
    """Numbers after a step; each is a function of the run's state alone, so a resumed run repeats them.

    To be called on every rank alike. The loss is that of the formula, without `loss.scale`.
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
