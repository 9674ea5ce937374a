"""The world a rank lives in: start and end, the collectives that the rest uses, output from rank 0.

A process without torchrun's variables is a world of one and starts no process group.
"""

import datetime
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from simclr_dist.system.errors import RankError, SaveError, StoppedError, UserError

T = TypeVar("T")

# Larger ones gloo sends in one direction after the other: steps on 1 Gbit/s took 1.4 times as long.
GLOO_MESSAGE_BYTES = 2**19


@dataclass(frozen=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and the log."""
        return self.rank == 0


@contextmanager
def world(device: str = "auto", timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the world that torchrun (or nobody) set up, and leave it at the end.

    NCCL on CUDA, gloo on CPU. Raises RankError when CUDA is asked for and absent, or a node has more ranks than GPUs.
    """
    rank, size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise RankError(f"device: {device!r}: rank {rank} needs GPU {local_rank}, of {torch.cuda.device_count()} here")
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=place if on_cuda else None,
        )
    try:
        yield World(rank, size, local_rank, place)
    except StoppedError:  # a clean end too
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    # After an error the process ends anyway, and NCCL would wait here for ranks that are elsewhere.
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(minutes: float) -> None:
    """How long a rank waits for the others in a collective, from now on."""
    if dist.is_initialized():
        public = getattr(dist, "set_timeout", None)  # torch 2.14's name
        (public or dist.distributed_c10d._set_pg_timeout)(datetime.timedelta(minutes=minutes))


def environment(here: World) -> dict[str, Any]:
    """What bits and speed depend on beside the config."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class, which weights_only refuses
        "torchvision": str(torchvision.__version__),
        "world_size": here.size,
        "device": torch.cuda.get_device_name(here.device) if here.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(tensor: Tensor) -> Tensor:
    """Stack the ranks' tensors of one shape, [...] -> [world_size, ...], in rank order; no gradient."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    stacked = tensor.new_empty((world_size(), *tensor.shape))
    with record_function("gather"):
        # torch 2.14 deprecates the into_tensor names; the list form is in every version that is supported.
        dist.all_gather(list(stacked.unbind()), tensor.contiguous())
    return stacked


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the ranks in rank order: the same bits wherever the elements stand in a buffer."""
    if world_size() == 1:
        return tensor
    return _sum_in_order(all_gather(tensor))


def _sum_in_order(ranks: Tensor) -> Tensor:
    # Not .sum(0): from 5 ranks up its order of summation depends on where an element stands.
    total = ranks[0].clone()
    for part in ranks[1:]:
        total += part
    return total


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the ranks' [n_r, ...] tensors, whose n_r may differ, in rank order."""
    if world_size() == 1:
        return rows
    counts = all_gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return torch.cat([part[:n] for part, n in zip(all_gather(padded), counts, strict=True)])


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's small Python object, in rank order (torch pickles it between our own processes)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """Do something on every rank; a UserError or SaveError of any is raised on all, so that rank 0 can say it."""
    result: T | None = None
    error: UserError | SaveError | None = None
    try:
        result = action()
    except (UserError, SaveError) as caught:
        error = caught
    if raised := [e for e in all_gather_objects(error) if e is not None]:
        raise raised[0]
    return cast(T, result)


def on_rank_0(action: Callable[[], T]) -> T | None:
    """Do something on rank 0 while the others wait; its UserError or SaveError is raised on every rank."""
    return together(action if rank() == 0 else lambda: None)


def data_parallel(model: nn.Module, here: World, *, in_rank_order: bool) -> nn.Module:
    """DDP around the model, or the model itself in a world of one; `in_rank_order` as `_sum_in_rank_order`."""
    if here.size == 1:
        return model
    # Buffers need no exchange: global BatchNorm gives every rank the same. torch 2.14 renamed the argument.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    ddp = DistributedDataParallel(
        model,
        device_ids=[here.local_rank] if here.device.type == "cuda" else None,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},  # type: ignore[arg-type]
    )
    if in_rank_order:
        ddp.register_comm_hook(None, _sum_in_rank_order)
    return ddp


def _sum_in_rank_order(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP hook that averages a bucket by summing each element in rank order.

    gloo's and NCCL's all-reduce sum in an order that depends on an element's position in the bucket, and DDP rebuilds its
    buckets after the first backward: a resumed run would differ from an uninterrupted one in the last bit. Each rank sums
    its share of everybody's elements and then gives it to all, so the bytes on the wire are those of a ring all-reduce.
    """
    flat, size = bucket.buffer(), world_size()
    at_once = len(flat) if flat.is_cuda else size * GLOO_MESSAGE_BYTES // flat.element_size()
    with record_function("all-reduce"):
        for part in flat.split(at_once):
            chunks = torch.nn.functional.pad(part, (0, -len(part) % size))
            received = torch.empty_like(chunks)
            dist.all_to_all_single(received, chunks)
            total = _sum_in_order(received.view(size, -1)).div_(size)
            part.copy_(all_gather(total).flatten()[: len(part)])
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[flat.device] if flat.is_cuda else None)
    future.set_result(flat)
    return future
