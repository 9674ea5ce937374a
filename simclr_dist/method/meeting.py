"""Bring the ranks together. Who waits says for whom, and hears stop signals."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # its stubs lack them

from simclr_dist.system import signals
from simclr_dist.system.errors import LostRankError, PassingError, RankError, StoppedError, reason_of, say
from simclr_dist.system.ranks import TO_RUN_ALONE, Place
from simclr_dist.system.slurm_job import job_id

_SAY_SECONDS = 10.0
_STOP_SECONDS = 5.0  # after a stop signal: the others may come, and then all stop together
_TRY_SECONDS = 10.0


def meet(place: Place, timeout: timedelta) -> Store:
    """Return the store of all ranks, once they are there.

    Raises PassingError for a port in use; RankError for a master of which nobody knows, and for ranks that do not come. Where
    the ranks start again by themselves, that may pass: it is a LostRankError there. Raises StoppedError after a stop signal.
    """
    wait = _Wait(place, timeout)
    tcp = _connect(place, wait)
    tcp.set_timeout(timeout)
    # After a restart by torchrun itself the store is that of the start before.
    store = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp)
    keys = [f"rank-{rank}" for rank in range(place.size)]
    store.set(keys[place.rank], "")

    def missing() -> str:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if place.restarted and absent[: place.rank] != list(range(place.rank)):
            return ""  # all print to one place, and the first that is there speaks
        return f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent[:8]))}{', ...' * (len(absent) > 8)}"

    try:
        while not store.check(keys if place.rank == 0 else ["all"]):
            wait.pause(missing)
        store.set("all", "")
    except DistError as error:
        wait.end(f"rank {place.rank} of {place.size} waited for the others, and then rank 0 was gone: {reason_of(error)}")
    return store


def _connect(place: Place, wait: "_Wait") -> TCPStore:
    """Open the store at the master, as often as it takes."""
    attempt, reason = _Attempt(place), "no answer"
    while attempt.store is None:
        if (error := attempt.error) is not None:
            reason = reason_of(error)
            if "EADDRINUSE" in reason:
                line = f"MASTER_PORT: {attempt.port}: is in use on this machine; take another, or end what has it"
                if place.restarted and job_id() is None:  # torchrun has chosen it, and chooses another
                    wait.end(line)
                raise PassingError(line)
            if isinstance(error, socket.gaierror | UnicodeError) and not place.restarted:  # UnicodeError: it can be no name
                wait.end(f"MASTER_ADDR: {attempt.host!r}: {reason}; name the machine of rank 0")
            attempt = _Attempt(place)
        wait.pause(lambda: f"rank 0 ({reason})")  # noqa: B023 (called at once)
    return attempt.store


class _Attempt(threading.Thread):
    """Try once to open the store. Rank 0 hosts it, unless torchrun does. In a thread: torch may hang in it, and is deaf."""

    def __init__(self, place: Place) -> None:
        super().__init__(daemon=True)
        assert place.master is not None, "a process alone meets nobody"
        self._place, (self.host, self.port) = place, place.master
        self.store: TCPStore | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        is_host = self._place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        at_most = timedelta(seconds=_TRY_SECONDS)
        try:
            socket.getaddrinfo(self.host, self.port)  # whose errors tell more than torch's
            if not is_host:
                socket.create_connection((self.host, self.port), _TRY_SECONDS).close()
            how = {"wait_for_workers": False, "multi_tenant": True}
            self.store = TCPStore(self.host, self.port, self._place.size, is_host, at_most, **how)
        except (OSError, UnicodeError, DistError) as error:
            self.error = error


class _Wait:
    """The patience of one rank."""

    def __init__(self, place: Place, timeout: timedelta) -> None:
        self._place, self._timeout = place, timeout
        self._began, self._spoken = time.monotonic(), False

    def pause(self, whom: Callable[[], str]) -> None:
        """Sleep a moment; `whom` names those that are missing. Say it once, and raise when it is no use."""
        waited, minutes = time.monotonic() - self._began, self._timeout.total_seconds() / 60
        rank, (host, port) = f"rank {self._place.rank} of {self._place.size}", self._place.master or ("", 0)
        where = f"at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
        cure = "" if self._place.restarted else f"; {TO_RUN_ALONE}"
        if waited > self._timeout.total_seconds():
            self.end(f"{rank} has waited {minutes:g} minutes for {whom() or 'others'} {where}{cure}")
        if not self._spoken and waited > _SAY_SECONDS:
            self._spoken = True
            if missing := whom():
                say(f"{rank} waits for {missing} {where}, {minutes:g} minutes at most{cure}")
        if (at := signals.requested_at()) is not None and time.time() > at + _STOP_SECONDS:
            raise StoppedError(f"{signals.name(signals.requested())} before the ranks had met")
        time.sleep(min(1.0, 0.02 + waited / 10))

    def end(self, line: str) -> NoReturn:
        """Raise an error that says `line`."""
        raise (LostRankError if self._place.restarted else RankError)(line)
