"""A small parent without torch: hands a child its stop signals, outlives its crash, and takes it along when it dies itself."""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from simclr_dist.system import signals

_POLL_SECONDS = 0.1


def supervise(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    tell: Callable[[int], Iterable[int]] = lambda child: (child,),
    give_up: Callable[[int], bool] = lambda child: False,
) -> int:
    """Run `command` to its end; returns its exit code, minus the number of the signal that killed it.

    Call `signals.listen` before. The child starts with the stop signals blocked: a rank takes them up by `listen`, torchrun
    never does and so cannot be confused by them. Ours are handed to the processes that `tell` names, given the child's id.
    The child is killed when `give_up`, given the same, says so.
    """
    with signals.blocked():
        parent = os.getpid()
        child = subprocess.Popen(command, env=env, preexec_fn=lambda: signals.die_with(parent))
    told: set[tuple[int, int]] = set()
    try:
        while True:
            try:
                return child.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                pass
            if asked := signals.asked():
                for word in {(process, asked) for process in tell(child.pid)} - told:
                    _send(*word)
                    told.add(word)
            if give_up(child.pid):
                child.kill()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def children(parent: int) -> list[int]:
    """Process ids of what `parent` has started and is still there."""
    try:
        threads = list(Path(f"/proc/{parent}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _send(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
