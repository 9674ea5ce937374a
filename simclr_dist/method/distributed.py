"""Join the process group and use its collectives. Without torchrun's variables the world is one process."""

import datetime
import functools
import inspect
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # torch's stubs lack it
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from simclr_dist.method.meeting import meet
from simclr_dist.system.errors import LostRankError, PassingError, RankError, SaveError, StoppedError, UserError
from simclr_dist.system.machine import cores
from simclr_dist.system.ranks import read_place
from simclr_dist.system.slurm_job import gpus_given

T = TypeVar("T")

# gloo sends larger ones in one direction after the other: steps on 1 Gbit/s took 1.4 times as long.
GLOO_MESSAGE_BYTES = 2**19


@dataclass(frozen=True)
class World:
    """This process's place among the ranks."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and the log."""
        return self.rank == 0


@contextmanager
def process_group(device: str = "auto", timeout_minutes: float = 10.0) -> Iterator[World]:
    """Join the process group that torchrun set up; leave it afterwards. Without torchrun it is a group of one.

    NCCL on CUDA, gloo on CPU. Raises RankError where CUDA is used and this rank has no GPU, and as `read_place` and `meet` do.
    """
    place = read_place()
    rank, size, gpu = place.rank, place.size, place.local_rank
    on_cuda = device == "cuda" or (device == "auto" and (torch.cuda.is_available() or gpus_given() > 0))
    if on_cuda:
        gpus = torch.cuda.device_count()
        if gpu >= gpus:
            error = PassingError if gpu < gpus_given() else RankError  # a broken one is missing here
            raise error(f"device: {device!r}: rank {rank} needs GPU {gpu}, of {gpus} here")
        if size > 1 and gpus > 1 and not os.environ.get("LOCAL_RANK"):
            raise RankError(f"LOCAL_RANK: is not set, and says which of the {gpus} GPUs here is that of rank {rank}")
        torch.cuda.set_device(gpu)
    if "OMP_NUM_THREADS" not in os.environ and cores() < torch.get_num_threads():  # which knows the affinity, and no quota
        torch.set_num_threads(cores())
    where = torch.device("cuda", gpu) if on_cuda else torch.device("cpu")
    if place.master is not None:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        how: dict[str, Any] = {"store": meet(place, timeout), "rank": rank, "world_size": size, "timeout": timeout}
        dist.init_process_group("nccl" if on_cuda else "gloo", device_id=where if on_cuda else None, **how)
    try:
        yield World(rank, size, gpu, where)
    except StoppedError:  # a clean end too
        if dist.is_initialized():
            dist.destroy_process_group()
        raise
    # After an error the process ends anyway, and NCCL would wait here for ranks that are elsewhere.
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Raise LostRankError when torch or gloo cannot reach another rank. It replaces their errors."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors, also out of DDP's backward. Only their text, with its source file, tells.
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise LostRankError(str(error)) from error
        raise


def set_timeout(minutes: float) -> None:
    """Set how long a rank waits for the others in a collective."""
    if dist.is_initialized():
        public = getattr(dist, "set_timeout", None)  # torch 2.14's name
        (public or dist.distributed_c10d._set_pg_timeout)(datetime.timedelta(minutes=minutes))


def environment(world: World) -> dict[str, Any]:
    """List what a run's bits and speed depend on beside the config."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # as text: weights_only refuses its class
        "torchvision": str(torchvision.__version__),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpus": cores(),
    }


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_ranks() -> int:
    """Return the number of ranks on this machine; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(tensor: Tensor) -> Tensor:
    """Stack the ranks' tensors in rank order, [...] -> [world_size, ...]. All have one shape. No gradient."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    stacked = tensor.new_empty((world_size(), *tensor.shape))
    with record_function("gather"):
        # torch 2.14 deprecates the into_tensor names; the list form is in every version that is supported.
        dist.all_gather(list(stacked.unbind()), tensor.contiguous())
    return stacked


def first_derivative_only(backward: Callable[..., T]) -> Callable[..., T]:
    """Refuse create_graph in a Function's backward. Raises RuntimeError.

    torch's once_differentiable alone refuses only what depends on the upstream gradient; a derivative of the rest would be 0.
    """

    @functools.wraps(backward)
    def first(*arguments: Any) -> T:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "there is no second derivative of NT-Xent, global BatchNorm and exact sums; leave create_graph out"
            )
        return backward(*arguments)

    return first


def all_sum(*parts: Tensor) -> Tensor:
    """Sum tensors of one shape in order, rank after rank. All ranks pass equally many.

    An element's bits do not depend on its place in a buffer.
    """
    return _sum_in_order(all_gather(torch.stack(parts)).flatten(0, 1))


def sum_integers(tensor: Tensor) -> Tensor:
    """Sum int64 over the ranks in place, in any order."""
    if world_size() > 1:
        with record_function("all-reduce"):
            dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> None:
    """Give every rank the tensor of rank 0, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def _sum_in_order(parts: Tensor) -> Tensor:
    # Not .sum(0): from 5 parts up its order of summation depends on where an element stands.
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the ranks' [n_r, ...] tensors in rank order. n_r may differ."""
    if world_size() == 1:
        return rows
    counts = all_gather(torch.tensor(len(rows), device=rows.device)).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    return torch.cat([part[:n] for part, n in zip(all_gather(padded), counts, strict=True)])


def all_gather_objects(value: Any) -> list[Any]:
    """Gather small Python objects in rank order. Torch pickles them, only between our own processes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_equal(value: Any) -> bool:
    """Return whether every rank passes the same value, by its repr."""
    return len({repr(other) for other in all_gather_objects(value)}) == 1


def together(action: Callable[[], T]) -> T:
    """Do `action` on every rank. A UserError or SaveError of any is raised on all, so that rank 0 can report it."""
    result: T | None = None
    error: UserError | SaveError | None = None
    try:
        result = action()
    except (UserError, SaveError) as caught:
        error = caught
    if raised := [e for e in all_gather_objects(error) if e is not None]:
        raise raised[0]
    return cast(T, result)


def on_rank_0(action: Callable[[], T], *, however_long: bool = False) -> T | None:
    """Do `action` on rank 0; the others wait and get None. Its UserError or SaveError is raised on every rank.

    They wait in a collective, which times out, or for an action that may take `however_long` as `await_rank_0` does.
    """

    def act() -> T | None:
        try:
            return action() if rank() == 0 else None
        finally:
            if however_long:
                await_rank_0()

    return together(act)


def await_rank_0() -> None:
    """Wait until rank 0 comes here, too. All ranks call it equally often.

    They look into the group's store, in Python: no collective is under way that could time out, and a stop signal is heard at
    once. The store goes with its host, rank 0 or torchrun.
    """
    if world_size() == 1:
        return
    store, pause = dist.distributed_c10d._get_default_store(), 0.01
    times = store.add(f"simclr_dist/came/{rank()}", 1)
    while rank() and store.add("simclr_dist/came/0", 0) < times:
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)


def data_parallel(model: nn.Module, world: World, *, in_rank_order: bool) -> nn.Module:
    """Wrap the model in DDP if there are several ranks. `in_rank_order` is slower and repeatable (`_sum_in_rank_order`)."""
    if world.size == 1:
        return model
    # Buffers need no exchange: global BatchNorm gives every rank the same. torch 2.14 renamed the argument.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    ddp = DistributedDataParallel(
        model,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        **{"forward_sync_buffers" if renamed else "broadcast_buffers": False},  # type: ignore[arg-type]  # either name
    )
    if in_rank_order:
        ddp.register_comm_hook(None, _sum_in_rank_order)
    return ddp


def _sum_in_rank_order(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of DDP, summing each element in rank order.

    The all-reduce of gloo and NCCL sums in an order that depends on an element's position in the bucket. DDP rebuilds its
    buckets after the first backward. So a resumed run would differ from an uninterrupted one in the last bit. Each rank
    sums its share of all elements and then gives it to all: the bytes on the wire are those of a ring all-reduce.
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
