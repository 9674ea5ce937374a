"""Each encoder that a run exports, evaluated once as it appears; the curve goes to the run's TensorBoard."""

import argparse
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simclr_dist.encoder.file import file_digest
from simclr_dist.evaluate.features.extraction import EncoderError
from simclr_dist.evaluate.job import measure
from simclr_dist.evaluate.options import POLL, Settings, check_arguments, check_watch
from simclr_dist.evaluate.result.board import board_folder
from simclr_dist.evaluate.result.curve import Curve
from simclr_dist.evaluate.result.earlier import Baselines, baselines, difference, read_result
from simclr_dist.evaluate.result.report import NAMES, TRAINED, UNTRAINED, Result, Say, UnwrittenError, result_path
from simclr_dist.evaluate.sets import Sets
from simclr_dist.method.distributed import World, all_gather_objects, world
from simclr_dist.run import claim as ledger
from simclr_dist.run.folder import read_status
from simclr_dist.system.errors import DataError

_ENDED = ("done", "failed", "diverged")  # a run that crashed or was preempted may go on


def watch(
    run: str | Path,
    train: str | Path,
    test: str | Path,
    settings: Settings | None = None,
    *,
    poll: float = POLL,
    device: str = "auto",
    say: Say = lambda _: None,
) -> int:
    """Evaluate every encoder of `run` that has no result of these settings yet, until the run has ended.

    The oldest first; new ones are looked for every `poll` seconds. Each result is written as by `job.evaluate`, but raw
    pixels and the untrained encoder are measured for one encoder and taken over for the others. `say` gets a line an
    encoder, on rank 0. Returns the exit code: 0, or 2 where an encoder could not be evaluated, or its page not be written.

    Raises ConfigError for a folder that is no run's, DataError as `job.evaluate` does.
    """
    settings, run = settings or Settings(), Path(run)
    check_watch(run, poll)
    with world(device) as here:
        sets, orders = Sets(train, test), Orders(here)
        if here.is_main:
            with _alone(run, poll, say):
                code = _lead(here, run, sets, settings, orders, poll, say)
            orders.give({"code": code})
        else:
            code = _follow(here, sets, settings, orders)
        all_gather_objects(code)  # rank 0 may hold the store, from which the others have to read the end
    return code


def watch_from_arguments(arguments: argparse.Namespace) -> int:
    """`watch` as `options.add_arguments` were told; returns the exit code."""
    return watch(
        arguments.watch,
        arguments.train,
        arguments.test,
        check_arguments(arguments),
        poll=POLL if arguments.poll is None else arguments.poll,
        device=arguments.device,
        say=lambda line: print(line, flush=True),
    )


class Orders:
    """Rank 0's word on what is next, through the process group's store.

    Who waits for it, waits in Python: a stop signal is heard at once, and no collective is under way that could time out.
    """

    def __init__(self, here: World) -> None:
        self._store = dist.distributed_c10d._get_default_store() if here.size > 1 else None
        self._number = 0

    def give(self, order: dict[str, Any]) -> None:
        """Of rank 0."""
        if self._store is not None:
            self._store.set(self._next_key(), json.dumps(order))

    def take(self) -> dict[str, Any]:
        """Of the others."""
        assert self._store is not None
        key = self._next_key()
        while not self._store.check([key]):
            time.sleep(0.2)
        order: dict[str, Any] = json.loads(self._store.get(key))
        return order

    def _next_key(self) -> str:
        self._number += 1
        return f"simclr_dist/watch/{self._number}"


def _folder(settings: Settings) -> Path | None:
    """Of feature files: with many encoders only where one was named, since each leaves a file as large as its features."""
    return Path(settings.features) if settings.features and settings.keep_features else None


def _follow(here: World, sets: Sets, settings: Settings, orders: Orders) -> int:
    """What the ranks other than 0 do."""
    while "encoder" in (order := orders.take()):
        try:
            known = Baselines(*order["known"]) if order["known"] else None
            measure(here, order["encoder"], sets, settings, known=known)
        except EncoderError:
            continue  # rank 0 says it
    return int(order["code"])


def _lead(here: World, run: Path, sets: Sets, settings: Settings, orders: Orders, poll: float, say: Say) -> int:
    """What rank 0 does."""
    encoders = _Encoders(run, sets, settings, say)
    told = None
    while True:
        # Read before the encoders are listed: a run that has ended exports no more.
        status = read_status(run)
        state, ended = status.get("state", "not started"), ledger.given_up(run)
        if path := encoders.next():
            orders.give({"encoder": str(path), "known": encoders.known})
            try:
                result = measure(here, path, sets, settings, known=encoders.known, features=_folder(settings), warn=say)
            except EncoderError as error:
                encoders.failed(path, error)
            except UnwrittenError as error:
                if not error.stored:
                    raise
                encoders.evaluated(path, error.result, unwritten=str(error))
            else:
                encoders.evaluated(path, result)
        elif state in _ENDED or ended:
            break
        else:
            if state != told:
                say(f"{run}: {state}; waiting for its next encoder")
                told = state
            time.sleep(poll)
    why = ended or status.get("reason")
    reason = f" ({why})" if why else ""
    failed = f", {encoders.failures} could not be" if encoders.failures else ""
    pages = f", {encoders.unwritten} pages could not be written" if encoders.unwritten else ""
    say(f"{run}: {state}{reason}; {encoders.successes} encoders evaluated{failed}{pages}")
    return 2 if encoders.failures or encoders.unwritten else 0


class _Encoders:
    """The encoders of a run: which is next, and what became of those before. For rank 0."""

    def __init__(self, run: Path, sets: Sets, settings: Settings, say: Say) -> None:
        self._run, self._settings, self._say = run, settings, say
        self._digests = {"train": sets.train.digest, "test": sets.test.digest}
        self._curve = Curve(board_folder(run, settings.layer))
        self._files: dict[Path, tuple[int, ...]] = {}  # as they were when they were last looked at
        self._good: dict[Path, bool] = {}
        self.known: Baselines | None = None
        self.unwritten = 0  # pages

    @property
    def successes(self) -> int:
        """How many have a result."""
        return sum(self._good.values())

    @property
    def failures(self) -> int:
        """How many could not be evaluated."""
        return len(self._good) - self.successes

    def next(self) -> Path | None:
        """The oldest encoder without a result of these settings."""
        for path in sorted((self._run / "encoders").glob("step-*.safetensors")):
            stat = path.stat()
            file = stat.st_ino, stat.st_size, stat.st_mtime_ns
            if self._files.get(path) == file:
                continue
            self._files[path] = file
            result = read_result(result_path(path, layer=self._settings.layer))
            if not result:
                return path
            if changed := difference(result, self._settings, encoder=file_digest(path), **self._digests):
                self._say(f"{path.stem}: evaluated before with {changed}: again")
                return path
            self._take_in(path, result, "evaluated before")
        return None

    def evaluated(self, path: Path, result: Result, *, unwritten: str = "") -> None:
        """The result of what was `next`; `unwritten` says why it has no page."""
        if unwritten:
            self.unwritten += 1
            self._say(unwritten)
        self._take_in(path, result, f"{result['seconds']['total']:.0f} s")

    def failed(self, path: Path, error: EncoderError) -> None:
        """What was `next` has no result."""
        self._good[path] = False
        self._say(f"{path.stem}: cannot be evaluated: {error}")

    def _take_in(self, path: Path, result: Result, how: str) -> None:
        self._good[path] = True
        try:
            self._curve.add(result, result_path(path, layer=self._settings.layer).stat().st_mtime)
        except OSError as error:
            folder = board_folder(self._run, self._settings.layer)
            self._say(f"{folder}: cannot be written ({error.strerror}); tried again at the next encoder")
        parts = result["protocols"].items()
        line = f"{path.stem}: " + ", ".join(f"{NAMES[name]} {part['results'][TRAINED]['top1']:.2f} %" for name, part in parts)
        if self._settings.baselines:
            self.known = self.known or baselines(result)
            rows = [part["results"][UNTRAINED]["top1"] for _, part in parts if UNTRAINED in part["results"]]
            line += "; untrained " + ", ".join(f"{top1:.2f}" for top1 in rows)
        self._say(f"{line}; {how}")


@contextmanager
def _alone(run: Path, poll: float, say: Say) -> Iterator[None]:
    """Hold the run's lock for watchers, which ends with the process; another that has it is waited for."""
    path = run / "eval" / ".watch"
    try:
        path.parent.mkdir(exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        told = False
        while not _locked(lock, path, say):
            if not told:
                say(f"{run}: is watched by {path.read_text().strip() or 'another process'}; waiting for it to end")
                told = True
            time.sleep(poll)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def _locked(lock: int, path: Path, say: Say) -> bool:
    """Whether the lock is ours now; also where the file system has none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        say(f"{path}: cannot be locked ({error.strerror}): see that no other process watches this run")
    return True
