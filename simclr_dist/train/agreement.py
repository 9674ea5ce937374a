"""What all ranks must agree on: that the run stops, and that their parameters are the same."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_dist.method.distributed import all_gather, all_gather_objects, rank, world_size
from simclr_dist.system.errors import RanksDifferError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_asked(mine: int) -> int:
    """The largest of all ranks' words (0, or a signal's number), waited for: before the first step."""
    return int(max(all_gather_objects(mine)))


class StopAgreement:
    """Makes one rank's stop signal everybody's, at the same step.

    The word of a step is read at the next one, when it has long arrived: no rank, and no GPU, waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._word = torch.zeros(1, dtype=torch.int32, device=device)
        self._arrived = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._work: dist.Work | None = None
        self._copied: torch.cuda.Event | None = None
        self._sent = False

    def exchange(self, mine: int) -> int:
        """Give this rank's word (0, or a signal's number) at the end of a step; returns the largest of the step before."""
        if world_size() == 1:
            return mine
        before = self.finish()
        self._word.fill_(mine)
        if self._word.is_cuda:
            dist.all_reduce(self._word, dist.ReduceOp.MAX)  # in the stream, behind the step
            self._arrived.copy_(self._word, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._work = dist.all_reduce(self._word, dist.ReduceOp.MAX, async_op=True)
        self._sent = True
        return before

    def finish(self) -> int:
        """Wait for the word that is under way, as every rank must before it leaves; returns it."""
        if not self._sent:
            return 0
        self._sent = False
        if self._copied is not None:
            self._copied.synchronize()
            return int(self._arrived)
        assert self._work is not None
        self._work.wait()
        return int(self._word)


def check_ranks_agree(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raises RanksDifferError, naming tensor and rank, unless every rank holds the same bits in each of `tensors`."""
    if world_size() == 1:
        return
    found = all_gather(torch.stack([_fingerprint(tensor) for tensor in tensors.values()]))  # [world_size, tensors]
    usual = found.mode(0).values
    wrong = (found != usual).nonzero().tolist()
    if wrong:
        names = list(tensors)
        several = f" ({len(wrong)} such differences)" if len(wrong) > 1 else ""
        raise RanksDifferError(
            f"step {step}: rank {wrong[0][0]} holds other numbers in {names[wrong[0][1]]} than most of the {world_size()} ranks"
            f"{several}; seen by rank {rank()}. Memory or arithmetic of a device is at fault, or devices of different kinds"
            " are mixed"
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """int64 scalar on the tensor's device: a sum of its bits with odd weights by place, so one flipped bit changes it."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view(_BITS[bits.element_size()]).to(torch.int64)
    weights = torch.arange(len(bits), device=bits.device).mul_(2).add_(1).mul_(0x9E3779B97F4A7C15 - 2**64)
    return weights.mul_(bits).sum()
