"""Put a small parent without torch over a child. It passes stop signals on, outlives a crash, and leaves no child behind."""

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
    """Run `command` to its end; return its exit code. If a signal killed it, return minus the number of that signal.

    Call `signals.listen` before. The child starts with the stop signals blocked: a rank takes them up by `listen`; torchrun
    never does, and so cannot be confused by them. `tell(child)`: return the processes that our stop signals are passed on to.
    `give_up(child)`: return True to kill the child.
    """
    with signals.blocked():
        parent = os.getpid()
        child = subprocess.Popen(command, env=env, preexec_fn=lambda: signals.die_with(parent))
    sent: set[tuple[int, int]] = set()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(_POLL_SECONDS)
            if number := signals.requested():
                for process in tell(child.pid):
                    if (process, number) not in sent:
                        sent.add((process, number))
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(process, number)
            if give_up(child.pid):
                child.kill()
    finally:
        child.kill()
        child.wait()


def children(parent: int) -> list[int]:
    """Return the ids of processes that `parent` has started. Only those that are still there count."""
    try:
        threads = list(Path(f"/proc/{parent}/task").iterdir())
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
