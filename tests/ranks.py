"""Real processes for the distributed tests: a function on every rank of a gloo world, in bounded time."""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from simclr_dist.method.distributed import World, world

# A server that has imported torch once forks the ranks: 0.1 s a rank and not 3, and each is still a fresh process.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["simclr_dist.train.learner", "torch.distributed.nn", "torch._dynamo"])


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call function(here: World, *args) on `world_size` ranks; returns each rank's result, in rank order.

    The function stands at a module's top level; results are tensors and plain values. The first rank that fails ends all,
    and its traceback is the message of the AssertionError; so does `timeout` (seconds).
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            _CONTEXT.Process(target=_rank, args=(function, args, rank, world_size, port, folder), daemon=True)
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in ranks:
                process.start()
            _wait(ranks, deadline)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        failures = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.error")))
        codes = [process.exitcode for process in ranks]
        assert codes == [0] * world_size, f"exit codes {codes} of {world_size} ranks (-9: ended by the harness)\n{failures}"
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]


def _wait(ranks: list[BaseProcess], deadline: float) -> None:
    """Until all have ended well, or one has not, or it is too late."""
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            return
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        with world("cpu", timeout_minutes=4) as here:
            torch.save(function(here, *args), Path(folder, f"{rank}.pt"))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def failing(here: World) -> None:
    """Rank 1 fails while the others wait for it."""
    assert here.rank != 1, "as it should"
    torch.distributed.barrier()
