"""Count the bytes that a rank sends in a step, by collective."""

import math
from dataclasses import dataclass

from simclr_dist.config.settings import Config
from simclr_dist.method.distributed import GLOO_MESSAGE_BYTES
from simclr_dist.method.pieces import groups
from simclr_dist.preflight.plan.trace import Footprint

BUCKET_BYTES, _FIRST_BUCKET_BYTES = 25 * 2**20, 2**20  # DDP's
_PAYLOAD_SHARE = 0.94  # of a link's rate: 1448 bytes of TCP in 1538 on Ethernet


@dataclass(frozen=True)
class Traffic:
    """Calls of one collective, and the bytes each rank sends. The ranks form a ring."""

    name: str
    calls: int
    sent: float
    hidden: bool = False  # may run beside the backward

    def seconds(self, bytes_a_second: float, latency: float, ranks: int) -> float:
        """Return the time of all calls: bytes over payload rate, plus latencies."""
        if ranks == 1:
            return 0.0
        return self.sent / (bytes_a_second * _PAYLOAD_SHARE) + self.calls * latency * math.ceil(math.log2(ranks))


def gathered(size: float, ranks: int) -> float:
    """Count a rank's sent bytes in an all-gather of `size` bytes each."""
    return size * (ranks - 1)


def summed(size: float, ranks: int) -> float:
    """Count a rank's sent bytes in an all-reduce of `size` bytes."""
    return 2 * size * (ranks - 1) / ranks


def step_traffic(config: Config, footprint: Footprint, ranks: int, *, on_cuda: bool) -> list[Traffic]:
    """List the collectives of a training step; none for one rank."""
    if ranks == 1:
        return []
    number = config.number_bytes
    local = config.global_batch_size // ranks
    dim = footprint.embedding_size
    return [
        _norm_forward(config, footprint, ranks, on_cuda=on_cuda),
        _norm_backward(config, footprint, ranks, on_cuda=on_cuda),
        Traffic("embeddings", 1, gathered(2 * local * dim * number, ranks)),
        Traffic("log-sum-exps", 1, gathered(4 * local * number, ranks)),
        *([] if on_cuda else [Traffic("shapes", 1, gathered(6 * 8, ranks))]),
        _gradients(config, footprint, ranks, on_cuda=on_cuda),
        Traffic("stop flag", 1, summed(4, ranks)),
    ]


def _gradients(config: Config, footprint: Footprint, ranks: int, *, on_cuda: bool) -> Traffic:
    gradient = footprint.parameters * config.number_bytes
    if config.deterministic == "exact":  # each tensor's largest number, and its sum in integers, of each micro-batch
        pieces = config.global_batch_size // (ranks * config.micro_batches * config.exact_piece)
        sent = gathered(8 * len(footprint.tensors), ranks) + summed(8 * footprint.parameters, ranks)
        calls = 2 * len(groups(footprint.tensors, pieces))
        return Traffic("gradients", calls * config.micro_batches, sent * config.micro_batches)
    in_rank_order = not on_cuda or config.deterministic
    buckets = [min(gradient, _FIRST_BUCKET_BYTES), *_parts(gradient - _FIRST_BUCKET_BYTES, BUCKET_BYTES)]
    calls = len(buckets)
    if in_rank_order:
        calls = 2 * (calls if on_cuda else sum(len(_parts(size, ranks * GLOO_MESSAGE_BYTES)) for size in buckets))
    return Traffic("gradients", calls, summed(gradient, ranks), hidden=not in_rank_order)


def _parts(size: int, most: int) -> list[int]:
    """Split `size` bytes into parts of at most `most`."""
    return [min(most, size - begin) for begin in range(0, size, most)]


def log_traffic(config: Config, footprint: Footprint, ranks: int) -> Traffic:
    """Return the traffic of embedding statistics. A logged step sends it besides."""
    local = config.global_batch_size // ranks
    parts = local // (config.micro_batches * config.piece) if config.deterministic == "exact" else 1
    each = 2 * local * footprint.embedding_size * 4 + 4 * 8 * parts
    return Traffic("statistics, at log steps", 2, gathered(each, ranks) if ranks > 1 else 0.0)


def _norm_forward(config: Config, footprint: Footprint, ranks: int, *, on_cuda: bool) -> Traffic:
    """Return the traffic of each layer's mean, variance and count."""
    pieces, number = config.micro_batches, _norm_bytes(config, ranks, on_cuda=on_cuda)
    passes = 1 if pieces == 1 else 2
    rounds = {footprint.block_norms: passes + config.activation_checkpointing, footprint.other_norms: passes}
    channels = sum(times * sum(2 * channels + 1 for channels in norms) for norms, times in rounds.items())
    calls = sum(times * len(norms) for norms, times in rounds.items())
    return Traffic("BatchNorm forward", pieces * calls, gathered(pieces * channels * number, ranks))


def _norm_backward(config: Config, footprint: Footprint, ranks: int, *, on_cuda: bool) -> Traffic:
    """Return the traffic of two sums a channel."""
    norms = [*footprint.block_norms, *footprint.other_norms]
    channels = 2 * sum(norms) * config.micro_batches
    calls = len(norms) * config.micro_batches
    return Traffic("BatchNorm backward", calls, gathered(channels * _norm_bytes(config, ranks, on_cuda=on_cuda), ranks))


def _norm_bytes(config: Config, ranks: int, *, on_cuda: bool) -> int:
    """Return the bytes of a number that is gathered, of each piece."""
    if config.deterministic == "exact":
        return 8 * config.global_batch_size // (ranks * config.micro_batches * config.exact_piece)
    return 4 if on_cuda and config.precision != "fp64" else 8
