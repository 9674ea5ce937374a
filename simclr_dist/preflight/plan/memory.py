"""Predict the memory of a rank in each phase of a step."""

from dataclasses import dataclass

from simclr_dist.config.settings import Config
from simclr_dist.method.distributed import GLOO_MESSAGE_BYTES
from simclr_dist.method.optim import numbers_kept
from simclr_dist.method.pieces import groups
from simclr_dist.preflight.plan.trace import Footprint
from simclr_dist.preflight.plan.traffic import BUCKET_BYTES
from simclr_dist.preflight.shared_memory import cut

_TILE_BYTES = 2**20  # of the loss on a CPU thread; Triton's kernels on CUDA keep theirs on the chip
# Copies of a view's images while colour and blur work: one, one in the order of the hues, five of the blurred half.
_COLOURING = 4.5


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank: its parts, and the peak of each phase."""

    weights: float
    gradients: float  # with DDP's buckets
    optimizer: float | None  # None: unknown for this optimizer
    views: float
    activations: float  # kept for the backward of one micro-batch
    loss: float
    phases: dict[str, float]
    host: float  # crops made ahead and in hand, in ordinary memory
    shared: float  # the part of it that is in shared memory, at most
    host_saving: float  # of rank 0 while it saves

    @property
    def peak(self) -> float:
        """Return the peak bytes of a step."""
        return max(self.phases.values())

    @property
    def highest(self) -> str:
        """Return the name of the phase with the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


def loss_bytes(rows: int, columns: int, dim: int, number: int, *, on_cuda: bool) -> float:
    """Predict the peak bytes of NT-Xent beside its input. `columns` are of all ranks."""
    local, gathered = rows * dim * number, columns * dim * number if columns > rows else 0
    tiles = 0 if on_cuda else 2 * min(_TILE_BYTES, columns**2 * number)
    return max(4 * local + gathered + tiles, 6 * local + gathered, 2 * local + 2 * gathered)


def rank_memory(config: Config, footprint: Footprint, ranks: int, *, on_cuda: bool) -> Memory:
    """Predict the memory of one of `ranks` ranks."""
    number = config.number_bytes
    local = config.global_batch_size // ranks
    views = 2 * local // config.micro_batches  # of a micro-batch
    dim = footprint.embedding_size
    weights, gradient = footprint.parameters * number + footprint.buffers, footprint.parameters * number
    buffers = numbers_kept(config.optim.name, config.optim.momentum)
    optimizer = None if buffers is None else gradient * buffers
    is_exact = config.deterministic == "exact"
    buckets = gradient if ranks > 1 and not is_exact else 0
    at_once = min(gradient, BUCKET_BYTES if on_cuda else ranks * GLOO_MESSAGE_BYTES)
    exchange = 4 * at_once if ranks > 1 and (not on_cuda or config.deterministic) else 0
    if is_exact:  # gradients of each piece, and three of their size in 64 bits
        pieces = local // (config.micro_batches * config.exact_piece)
        exchange = max(sum(footprint.tensors[some]) for some in groups(footprint.tensors, pieces)) * (number * pieces + 24)
    decays_copies = config.optim.name == "lars" and on_cuda and config.optim.weight_decay
    # Muon's are of one shape at a time, 6 of a wide matrix and 12 of a square one: less than 4 of all networks' weights.
    copied = 4 if config.optim.name == "muon" else bool(decays_copies)
    copies = footprint.decayed_parameters * number * copied

    view = local * config.data.channels * footprint.side**2 * 4
    z = 2 * local * dim * number
    loss = loss_bytes(2 * local, 2 * config.global_batch_size, dim, number, on_cuda=on_cuda)
    always = weights + (optimizer or 0) + buckets + footprint.buffers  # a second time: kept in case the step is skipped
    step = always + 2 * view
    kept = footprint.first.kept(views)
    colouring = _COLOURING * (view if on_cuda else min(view, 4 * 2**20)) + (0 if on_cuda else view)
    phases = {
        # The views and gradients of the step before are still there.
        "views": always + gradient + 3 * view + colouring,
        "optimizer": step + gradient + copies + z,
    }
    if config.micro_batches == 1:
        phases["loss"] = step + kept + z + loss
        phases["backward"] = step + z + max(footprint.first.peak(views), footprint.later.peak(views)) + exchange
    else:
        phases["first pass"] = step + z + footprint.without_graph.peak(views)
        phases["loss"] = step + 2 * z + loss
        phases["backward"] = step + 3 * z + max(footprint.first.peak(views), gradient + footprint.later.peak(views)) + exchange
    portions, workers = cut(config, ranks), config.data.workers
    host = portions.portion_bytes * portions.most(workers)
    shared = portions.shared_bytes(workers, pinned=on_cuda)[1]
    saved = checkpoint_bytes(config, footprint)
    saving, gradients = 2 * (saved or 0), gradient + buckets
    return Memory(weights, gradients, optimizer, 2 * view, kept, z + loss, phases, host, shared, saving)


def checkpoint_bytes(config: Config, footprint: Footprint) -> float | None:
    """Predict a checkpoint's size; None where the optimizer's state is unknown."""
    buffers = numbers_kept(config.optim.name, config.optim.momentum)
    return None if buffers is None else footprint.parameters * config.number_bytes * (1 + buffers) + footprint.buffers
