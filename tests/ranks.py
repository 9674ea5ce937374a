"""Real processes for the distributed tests: a function on every rank of a gloo world, in bounded time."""

import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from forkserver import CONTEXT, Command
from simclr_dist.method.distributed import World, process_group


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call function(here: World, *args) on `world_size` ranks; returns each rank's result, in rank order.

    The function stands at a module's top level; results are tensors and plain values. The first rank that fails ends all,
    and its traceback is the message of the AssertionError; so does `timeout` (seconds).
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            CONTEXT.Process(target=_rank, args=(function, args, rank, world_size, port, folder), daemon=True)
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


def commands(main: Callable[[Sequence[str]], int], arguments: Sequence[object], world_size: int) -> tuple[list[int], str, str]:
    """`main(arguments)` on `world_size` ranks: their exit codes, and what they have printed to stdout and to stderr."""
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [Command(main, arguments, environment=world | {"RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(world_size)]
    try:
        said = [command.communicate(timeout=300) for command in started]
        return [command.wait() for command in started], "".join(out for out, _ in said), "".join(error for _, error in said)
    finally:
        for command in started:
            with command:
                command.kill()


def _wait(ranks: list[BaseProcess], deadline: float) -> None:
    """Until all have ended well, or one has not, or it is too late."""
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode for process in ranks):
            return
        time.sleep(0.01)


def free_port() -> int:
    """A port of this machine that nobody uses."""
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
        with process_group("cpu", timeout_minutes=4) as world:
            torch.save(function(world, *args), Path(folder, f"{rank}.pt"))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None


def failing(world: World) -> None:
    """Rank 1 fails while the others wait for it."""
    assert world.rank != 1, "as it should"
    torch.distributed.barrier()
