"""What a rank sends in a step, by collective; counted in tests against real processes."""

import math
from dataclasses import dataclass

from simclr_dist.config.settings import Config
from simclr_dist.method.distributed import GLOO_MESSAGE_BYTES
from simclr_dist.preflight.plan.trace import Footprint

_BUCKET_BYTES, _FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # DDP's
WIRE_SHARE = 0.94  # of a link's rate is payload: 1448 bytes of TCP in 1538 on Ethernet


@dataclass(frozen=True)
class Traffic:
    """A kind of collective: calls a step, and bytes that each rank sends in them (it receives as many), with a ring."""

    name: str
    calls: int
    sent: float
    hidden: bool = False  # may run beside the backward

    def seconds(self, bytes_a_second: float, latency: float, ranks: int) -> float:
        """Time of all calls: bytes over the payload's share of the link, and log2(ranks) latencies a call."""
        if ranks == 1:
            return 0.0
        return self.sent / (bytes_a_second * WIRE_SHARE) + self.calls * latency * math.ceil(math.log2(ranks))


def gathered(size: float, ranks: int) -> float:
    """Bytes sent by a rank when each gives `size` bytes to all."""
    return size * (ranks - 1)


def summed(size: float, ranks: int) -> float:
    """Bytes sent by a rank in an all-reduce of `size` bytes, or in the two halves of one."""
    return 2 * size * (ranks - 1) / ranks


def step_traffic(config: Config, found: Footprint, ranks: int, *, on_cuda: bool) -> list[Traffic]:
    """The collectives of a training step; none in a world of one."""
    if ranks == 1:
        return []
    number = 8 if config.precision == "fp64" else 4
    local = config.global_batch_size // ranks
    dim = embedding_size(config, found)
    pieces = config.micro_batches
    in_rank_order = not on_cuda or config.deterministic
    gradient = found.parameters * number
    buckets = [min(gradient, _FIRST_BUCKET_BYTES), *_parts(gradient - _FIRST_BUCKET_BYTES, _BUCKET_BYTES)]
    calls = len(buckets)
    if in_rank_order:
        calls = 2 * (calls if on_cuda else sum(len(_parts(size, ranks * GLOO_MESSAGE_BYTES)) for size in buckets))
    return [
        _norm_forward(config, found, ranks, pieces, on_cuda=on_cuda),
        _norm_backward(found, ranks, pieces, on_cuda=on_cuda),
        Traffic("embeddings", 1, gathered(2 * local * dim * number, ranks)),
        Traffic("log-sum-exps", 1, gathered(4 * local * number, ranks)),
        *([] if on_cuda else [Traffic("shapes", 1, gathered(3 * 8, ranks))]),
        Traffic("gradients", calls, summed(gradient, ranks), hidden=not in_rank_order),
        Traffic("stop flag", 1, summed(4, ranks)),
    ]


def _parts(size: int, most: int) -> list[int]:
    """`size` bytes, `most` at a time."""
    return [min(most, size - begin) for begin in range(0, size, most)]


def log_traffic(config: Config, found: Footprint, ranks: int) -> Traffic:
    """What a step that is logged sends on top: the embedding statistics."""
    local, dim = config.global_batch_size // ranks, embedding_size(config, found)
    return Traffic("statistics, at log steps", 2, gathered(2 * local * dim * 4 + 4 * 8, ranks) if ranks > 1 else 0.0)


def embedding_size(config: Config, found: Footprint) -> int:
    """Of z."""
    return config.model.projector_dim if config.model.projector_depth else found.feature_size


def _norm_forward(config: Config, found: Footprint, ranks: int, pieces: int, *, on_cuda: bool) -> Traffic:
    """Mean, variance and count of each layer: in float64 with this package's BatchNorm, in float32 with SyncBatchNorm."""
    number = 4 if on_cuda and config.precision != "fp64" else 8
    passes = 1 if pieces == 1 else 2
    rounds = {found.block_norms: passes + config.activation_checkpointing, found.other_norms: passes}
    channels = sum(times * sum(2 * channels + 1 for channels in norms) for norms, times in rounds.items())
    calls = sum(times * len(norms) for norms, times in rounds.items())
    return Traffic("BatchNorm forward", pieces * calls, gathered(pieces * channels * number, ranks))


def _norm_backward(found: Footprint, ranks: int, pieces: int, *, on_cuda: bool) -> Traffic:
    """Two sums a channel: gathered and added in rank order on CPUs, an all-reduce of SyncBatchNorm."""
    norms = [*found.block_norms, *found.other_norms]
    channels, calls = 2 * sum(norms) * pieces, len(norms) * pieces
    return Traffic("BatchNorm backward", calls, summed(channels * 4, ranks) if on_cuda else gathered(channels * 8, ranks))
