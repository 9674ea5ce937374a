"""A rank's memory in the phases of a step, and what does not change between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from simclr_dist.config.settings import Config
from simclr_dist.method.distributed import GLOO_MESSAGE_BYTES
from simclr_dist.preflight.plan.trace import Footprint
from simclr_dist.preflight.plan.traffic import embedding_size

OPTIMIZER_BUFFERS = {"lars": 1, "sgd": 1, "adamw": 2}
_TILE_BYTES = 2**20  # of the loss on a CPU thread; Triton's kernels on CUDA keep theirs on the chip
# Copies of a view's images while colour and blur make it: itself, one in the order of the hues, five of the blurred half.
_COLOURING = 4.5
_PREFETCH = 2  # steps that a DataLoader's worker keeps ready
_BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank. What is fixed, the parts that come and go, and the most of all in each phase of a step."""

    weights: float
    gradients: float  # with DDP's buckets
    optimizer: float | None  # None: not known for this optimizer
    views: float
    activations: float  # kept for the backward of one piece
    loss: float
    phases: dict[str, float]
    host: float  # of the data workers, in ordinary memory
    host_saving: float  # of rank 0 while it saves

    @property
    def peak(self) -> float:
        """The most of a step."""
        return max(self.phases.values())

    @property
    def highest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def loss_bytes(rows: int, columns: int, dim: int, number: int, *, on_cuda: bool, threads: int = 1) -> float:
    """The most that NT-Xent holds beside the embeddings it is given: rows of this rank, columns of all ranks."""
    own, all_rows = rows * dim * number, columns * dim * number if columns > rows else 0
    tiles = 0 if on_cuda else 2 * min(_TILE_BYTES * threads, columns**2 * number)
    return max(4 * own + all_rows + tiles, 6 * own + all_rows, 2 * own + 2 * all_rows)


def rank_memory(config: Config, found: Footprint, side: int, ranks: int, *, on_cuda: bool, threads: int = 1) -> Memory:
    """For `ranks` ranks and views of `side` pixels."""
    number = 8 if config.precision == "fp64" else 4
    local = config.global_batch_size // ranks
    piece = 2 * local // config.micro_batches
    dim = embedding_size(config, found)
    weights, gradient = found.parameters * number + found.buffers, found.parameters * number
    buffers = OPTIMIZER_BUFFERS.get(config.optim.name)
    optimizer = None if buffers is None else gradient * buffers
    buckets = gradient if ranks > 1 else 0
    at_once = min(gradient, _BUCKET_BYTES if on_cuda else ranks * GLOO_MESSAGE_BYTES)
    exchange = 4 * at_once if ranks > 1 and (not on_cuda or config.deterministic) else 0
    copies = found.decayed_parameters * number if config.optim.name == "lars" and on_cuda and config.optim.weight_decay else 0

    view = local * 3 * side * side * 4
    z = 2 * local * dim * number
    loss = loss_bytes(2 * local, 2 * config.global_batch_size, dim, number, on_cuda=on_cuda, threads=threads)
    always = weights + (optimizer or 0) + buckets + found.buffers  # a second time: kept in case the step is skipped
    step = always + 2 * view
    kept = found.first.kept(piece)
    colouring = _COLOURING * (view if on_cuda else min(view, 4 * 2**20 * threads)) + (0 if on_cuda else view)
    phases = {
        # The views of the step before are still there, and so are the gradients.
        "views": always + gradient + 3 * view + colouring,
        "optimizer": step + gradient + copies + z,
    }
    if config.micro_batches == 1:
        phases["loss"] = step + kept + z + loss
        phases["backward"] = step + z + max(found.first.peak(piece), found.later.peak(piece)) + exchange
    else:
        phases["first pass"] = step + z + found.without_graph.peak(piece)
        phases["loss"] = step + 2 * z + loss
        phases["backward"] = step + 3 * z + max(found.first.peak(piece), gradient + found.later.peak(piece)) + exchange
    crops = 2 * local * 3 * side * side
    host = crops * max(1, _PREFETCH * config.data.workers)
    saved = checkpoint_bytes(config, found)
    return Memory(
        weights, gradient + buckets, optimizer, 2 * view, kept, z + loss, phases, host, 0 if saved is None else 2 * saved
    )


def checkpoint_bytes(config: Config, found: Footprint) -> float | None:
    """A checkpoint's size; None where the optimizer's state is not known."""
    buffers = OPTIMIZER_BUFFERS.get(config.optim.name)
    number = 8 if config.precision == "fp64" else 4
    return None if buffers is None else found.parameters * number * (1 + buffers) + found.buffers


def fewest_micro_batches(config: Config, ranks: int, fits: Callable[[int], bool]) -> int | None:
    """The fewest pieces for which `fits` says yes; None when not even pieces of one image a rank do."""
    local, rest = divmod(config.global_batch_size, ranks)
    if rest:
        return None
    divisors = sorted({d for k in range(1, math.isqrt(local) + 1) if local % k == 0 for d in (k, local // k)})
    return next((pieces for pieces in divisors if fits(pieces)), None)
