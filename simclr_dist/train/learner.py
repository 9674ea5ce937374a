"""Build the learner: model, gradient exchange, optimizer. Compute its gradient and its numbers."""

import contextlib
import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr_dist.config.settings import Config
from simclr_dist.data.views.colour import to_device
from simclr_dist.data.views.draws import uniforms, view_side
from simclr_dist.encoder.published import start_weights
from simclr_dist.method.batch_norm import frozen_running_statistics, use_global_batch_norm
from simclr_dist.method.distributed import World, all_equal, data_parallel, together
from simclr_dist.method.dropout import Keys
from simclr_dist.method.encoders import build_simclr, checkpoint_blocks
from simclr_dist.method.exact import ExactNTXentLoss, InPieces
from simclr_dist.method.loss import NTXentLoss, for_kernels, triton_problem
from simclr_dist.method.loss.statistics import embedding_statistics
from simclr_dist.method.microbatch import LossFunction, contrastive_backward
from simclr_dist.method.model import SimCLR
from simclr_dist.method.optim import build_optimizer, parameter_groups
from simclr_dist.method.precision import AUTOCAST, settle
from simclr_dist.system.errors import ConfigError
from simclr_dist.train.monitor import Stopwatch

_DRAWS = 2**16  # views are drawn by the same function; their numbers are below

MicroBatch = tuple[Tensor, Tensor]
"""View a and view b of this rank's images in it, float [n, c, s, s]."""


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
    loss: NTXentLoss
    loss_scale: LossScale | None  # of fp16
    counters: dict[str, Tensor]  # int64 device scalars
    init: str  # what the encoder really started from
    local_timer: Stopwatch  # of work that waits for no other rank
    seed: int = 0  # of the draws of random layers

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


def build_model(config: Config) -> SimCLR:
    """Build the model that the config describes, with random weights in float32."""
    side = view_side(config.views.preset, config.views.image_size)
    model = build_simclr(**config.model.shape, channels=config.data.channels, image_size=side)
    model.autocast = AUTOCAST.get(config.precision)
    if config.activation_checkpointing:
        checkpoint_blocks(model.encoder)
    model.channels_last = config.channels_last
    return model


def build_shapes(config: Config) -> SimCLR:
    """Build the model on the meta device, where it takes no memory."""
    try:
        with torch.device("meta"):
            return build_model(config)
    except ConfigError:  # some of torchvision's compute their widths by tensors, which must have values
        return build_model(config).to("meta")


def embedding_size(config: Config, model: SimCLR) -> int:
    """Return the size of z."""
    return config.model.projector_dim if config.model.projector_depth else model.encoder.feature_size


def kernel_problem(config: Config, size: int, world: World) -> str:
    """Return why the loss lacks its kernels on this rank, or ''. `size` is that of its embeddings.

    Raises ConfigError if `compile` needs them too.
    """
    wanted = for_kernels(world.device, torch.float64 if config.precision == "fp64" else torch.float32, size)
    compiled = config.compile and world.device.type == "cuda"
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the caller says it
        problem = triton_problem(world.device) if wanted or compiled else ""
    if problem and compiled:
        raise ConfigError(f"compile: true: {problem}; install it, or set compile: false")
    return problem


def start_model(config: Config, world: World, *, resumed: bool = False) -> tuple[SimCLR, str]:
    """Build the model with its start weights, the same on every rank. Returns it and what it started from.

    A `resumed` run needs its start weights no more. Raises ConfigError and DataError for settings, or a file, that do not fit.
    """
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # 4 to 7 % of a step on a CPU, for who reads what nobody has written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    if config.deterministic == "exact" and world.device.type == "cpu":
        torch.set_num_threads(1)  # of two threads each sums its half
    torch.backends.cudnn.benchmark = not config.deterministic
    settle(config.precision, world.device)
    torch.manual_seed(config.seed)
    m = config.model
    model = build_model(config)
    files = {"prefix": m.init_prefix, "leave": m.init_except}
    start = "random" if resumed else m.init
    init = together(lambda: start_weights(model.encoder, m.encoder, start, m.init_file, **files))
    if not all_equal(init):
        cure = "put them on every node, and the run folder on a shared disk"
        raise ConfigError(f"model.init: some ranks could load the start weights and others could not; {cure}")
    return model, init


def build_learner(config: Config, world: World, started: tuple[SimCLR, str] | None = None) -> Learner:
    """Build DDP and optimizer around a model, or around that of `start_model`."""
    model, init = started or start_model(config, world)
    o = config.optim
    model.to(world.device, torch.float64 if config.precision == "fp64" else torch.float32)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    use_global_batch_norm(model, in_pieces=config.deterministic == "exact")
    groups = parameter_groups(model, o.weight_decay)
    how: dict[str, Any] = {"momentum": o.momentum, "trust_coefficient": o.trust_coefficient, "betas": o.betas}
    optimizer = build_optimizer(o.name, groups, lr=config.peak_lr, **how)
    if config.compile:
        model.encoder.compile()
    if config.deterministic == "exact":
        parallel: nn.Module = InPieces(model, config.exact_piece)
    else:
        parallel = data_parallel(model, world, in_rank_order=world.device.type == "cpu" or config.deterministic)
    counted = ("skipped", "skipped_in_a_row", "longest_skip", "clipped")
    counters = {name: torch.zeros((), dtype=torch.int64, device=world.device) for name in counted}
    loss_scale = LossScale(world.device) if config.precision == "fp16" else None
    timer = Stopwatch(world.device)
    return Learner(model, parallel, optimizer, build_loss(config), loss_scale, counters, init, timer, config.seed)


def build_loss(config: Config) -> NTXentLoss:
    """Build the loss that trains."""
    how = dataclasses.asdict(config.loss)
    if config.deterministic == "exact":
        return ExactNTXentLoss(**how, micro_batches=config.micro_batches, images=config.exact_piece)
    return NTXentLoss(**how)


def cut(view_a: Tensor, view_b: Tensor, count: int) -> list[MicroBatch]:
    """Cut this rank's views, float [n, c, s, s], into `count` micro-batches."""
    return list(zip(view_a.chunk(count), view_b.chunk(count), strict=True))


def backward(
    learner: Learner,
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction | None = None,
    *,
    rows: Sequence[Tensor] = (),
    step: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of the global batch's loss. It carries fp16's scale. Returns (that loss, z_a, z_b).

    `rows` are each micro-batch's manifest rows, [n]. With `step` they decide what dropout and drop path draw.
    """
    plain = loss_function or learner.loss
    scale = learner.loss_scale
    return contrastive_backward(
        learner.parallel,
        micro_batches,
        plain if scale is None else lambda z_a, z_b: plain(z_a, z_b) * scale.factor,
        no_sync=getattr(learner.parallel, "no_sync", contextlib.nullcontext),
        first_pass=functools.partial(frozen_running_statistics, learner.model),
        each=lambda i: keyed(learner.model, learner.seed, step, rows[i]) if rows else contextlib.nullcontext(),
    )


def keyed(model: SimCLR, seed: int, step: int, rows: Tensor) -> contextlib.AbstractContextManager[None]:
    """Key random layers by (seed, step, row, view). `rows`, int64 [n], are the images whose two views the block takes."""
    keys: Keys | None = getattr(model.encoder, "keys", None)  # a module of the user's own has none
    if keys is None or keys.columns == 0:
        return contextlib.nullcontext()
    draws = functools.partial(uniforms, seed, step, count=keys.columns)
    of_images = np.concatenate([draws(rows=rows.numpy(), view=_DRAWS + view) for view in (0, 1)])
    words = to_device((of_images * 2**32).astype(np.int64), next(model.parameters()).device)
    return keys.using(words, [int(u * 2**32) for u in draws(rows=[0], view=_DRAWS + 2)[0]])


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
        **embedding_statistics(outcome["z_a"], outcome["z_b"], learner.loss.cut),
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
