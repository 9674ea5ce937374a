"""Make all ranks stop together, and check that their parameters are equal."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_dist.method.distributed import all_gather, all_gather_objects, rank, world_size
from simclr_dist.system.errors import RanksDifferError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_stop_signal(number: int) -> int:
    """Return the largest of all ranks' signal numbers (0 for none). Waits for all ranks; for use before the first step."""
    return int(max(all_gather_objects(number)))


class StopAgreement:
    """Passes one rank's stop signal to all ranks, at the same step.

    The numbers of one step are read at the next. By then they have arrived, so no rank and no GPU waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._largest = torch.zeros(1, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._reduction: dist.Work | torch.cuda.Event | None = None  # under way

    def exchange(self, number: int) -> int:
        """Send this rank's signal number (0 for none) after a step. Returns the largest of the step before."""
        if world_size() == 1:
            return number
        before = self.finish()
        self._largest.fill_(number)
        if self._largest.is_cuda:
            dist.all_reduce(self._largest, dist.ReduceOp.MAX)  # in the stream, behind the step
            self._on_host.copy_(self._largest, non_blocking=True)
            self._reduction = torch.cuda.Event()
            self._reduction.record()
        else:
            self._reduction = dist.all_reduce(self._largest, dist.ReduceOp.MAX, async_op=True)
        return before

    def finish(self) -> int:
        """Wait for the exchange under way, and return its largest number. Every rank must do this before it leaves."""
        reduction, self._reduction = self._reduction, None
        if reduction is None:
            return 0
        if isinstance(reduction, torch.cuda.Event):
            reduction.synchronize()
            return int(self._on_host)
        reduction.wait()
        return int(self._largest)


def check_ranks_agree(tensors: Mapping[str, Tensor], step: int) -> None:
    """Check that all ranks hold the same bits in each of `tensors`. Else raise RanksDifferError, with tensor and rank."""
    if world_size() == 1:
        return
    fingerprints = all_gather(torch.stack([_fingerprint(tensor) for tensor in tensors.values()]))  # [world_size, tensors]
    usual = fingerprints.mode(0).values
    wrong = (fingerprints != usual).nonzero().tolist()
    if wrong:
        names = list(tensors)
        several = f" ({len(wrong)} such differences)" if len(wrong) > 1 else ""
        raise RanksDifferError(
            f"step {step}: rank {wrong[0][0]} holds other numbers in {names[wrong[0][1]]} than most of the {world_size()} ranks"
            f"{several}; seen by rank {rank()}. Memory or arithmetic of a device is at fault, or devices of different kinds"
            " are mixed"
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """Sum the tensor's bits, with odd weights by place. One flipped bit changes the sum: int64 scalar, same device."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view(_BITS[bits.element_size()]).to(torch.int64)
    weights = torch.arange(len(bits), device=bits.device).mul_(2).add_(1).mul_(0x9E3779B97F4A7C15 - 2**64)
    return weights.mul_(bits).sum()
