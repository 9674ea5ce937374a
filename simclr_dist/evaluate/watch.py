"""Evaluate each encoder that a run exports, once, as it appears. The curve goes to the run's TensorBoard."""

import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from simclr_dist.encoder.file import file_digest
from simclr_dist.encoder.names import encoders, result_path
from simclr_dist.evaluate.features.extraction import EncoderError
from simclr_dist.evaluate.job import measure
from simclr_dist.evaluate.result.board import Curves, board_folder, watchers_lock
from simclr_dist.evaluate.result.earlier import Baselines, baselines, difference
from simclr_dist.evaluate.result.file import TRAINED, UNTRAINED, Result, UnwrittenError, read_result, title
from simclr_dist.evaluate.result.report import Say
from simclr_dist.evaluate.sets import Sets
from simclr_dist.evaluate.settings import POLL, Settings, check_watch
from simclr_dist.method.distributed import World, all_gather_objects, process_group
from simclr_dist.run.status import outlook, record_event
from simclr_dist.system.errors import DamagedError, refusing
from simclr_dist.system.files import lock
from simclr_dist.system.progress import Progress
from simclr_dist.system.slurm_job import job_id


def watch(
    run: str | Path,
    train: str | Path,
    test: str | Path,
    settings: Settings | None = None,
    *,
    val: str | Path | None = None,
    poll: float = POLL,
    device: str = "auto",
    say: Say = lambda _: None,
    note_end: Callable[[Path], None] = lambda _: None,
) -> int:
    """Evaluate every encoder of `run` without a result of these settings. It goes on until the run has ended.

    The oldest comes first; `poll` seconds pass between two looks for new ones. Each result is written as by `job.evaluate`,
    but raw pixels and the untrained encoder are measured for one encoder and reused for the others. `say` gets a line an
    encoder, on rank 0. `note_end` gets the run between two looks: it may record an end that the run itself could not. Returns
    the exit code: 0, or 2 where an encoder could not be evaluated, or its page not be written.

    Raises ConfigError for a folder that is no run's, DataError as `job.evaluate` does.
    """
    settings, run = settings or Settings(), Path(run)
    check_watch(run, poll)
    with process_group(device) as world:
        sets, orders = Sets(train, test, val), Orders(world)
        if world.is_main:
            with closing(_Pause(run, poll, say, note_end)) as pause, _alone(run, pause, say):
                code = _lead(world, run, sets, settings, orders, pause, say)
            orders.give({"code": code})
        else:
            code = _follow(world, sets, settings, orders)
        all_gather_objects(code)  # rank 0 may hold the store, from which the others have to read the end
    return code


class Orders:
    """Rank 0's orders to the other ranks, through the process group's store.

    They wait for an order in Python. A stop signal is heard at once, and no collective is under way that could time out.
    """

    def __init__(self, world: World) -> None:
        self._store = dist.distributed_c10d._get_default_store() if world.size > 1 else None
        self._keys = map("simclr_dist/watch/{}".format, itertools.count(1))

    def give(self, order: dict[str, Any]) -> None:
        """Give the other ranks an order; for rank 0."""
        if self._store is not None:
            self._store.set(next(self._keys), json.dumps(order))

    def take(self) -> dict[str, Any]:
        """Wait for the next order; for the other ranks."""
        assert self._store is not None
        key = next(self._keys)
        while not self._store.check([key]):
            time.sleep(0.2)
        order: dict[str, Any] = json.loads(self._store.get(key))
        return order


def _follow(world: World, sets: Sets, settings: Settings, orders: Orders) -> int:
    """Do what rank 0 orders; for the other ranks."""
    while "encoder" in (order := orders.take()):
        try:
            reused = Baselines(*order["baselines"]) if order["baselines"] else None
            measure(world, order["encoder"], sets, settings, reused=reused)
        except EncoderError:
            continue  # rank 0 says it
    return int(order["code"])


class _Pause:
    """Wait between two looks; for rank 0. Says for what, once, and then rarely, until `close`."""

    def __init__(self, run: Path, poll: float, say: Say, note_end: Callable[[Path], None]) -> None:
        self._run, self._poll, self._say, self._note_end = run, poll, say, note_end
        self._said, self._shown = "", ExitStack()
        self._waits = False

    def __call__(self, line: str) -> None:
        if not self._said and (job := job_id()):  # a stop that comes from now on has cost nothing
            record_event(self._run, "waiting", kind="eval", job=job)
        if line != self._said:
            self.close()
            self._say(line)
        if not self._waits:
            self._shown.enter_context(Progress(line, rarely=True))
        self._said, self._waits = line, True
        self._note_end(self._run)
        time.sleep(self._poll)

    def close(self) -> None:
        """Wait no more: there is work, or another thing to wait for."""
        self._shown.close()
        self._waits = False


def _lead(world: World, run: Path, sets: Sets, settings: Settings, orders: Orders, pause: _Pause, say: Say) -> int:
    """Evaluate each encoder as it comes; for rank 0. Returns the exit code."""
    encoders = _Encoders(run, sets, settings, say)
    # Kept only in a folder that was named: each of many encoders leaves a file as large as its features.
    folder = Path(settings.features) if settings.features else None
    while True:
        # Read before the encoders are listed: a run that has ended exports no more.
        future = outlook(run)
        if path := encoders.next():
            pause.close()
            orders.give({"encoder": str(path), "baselines": encoders.baselines})
            try:
                result = measure(world, path, sets, settings, reused=encoders.baselines, features=folder, warn=say)
            except EncoderError as error:
                encoders.failed(path, error)
            except UnwrittenError as error:
                if not error.stored:
                    raise
                encoders.evaluated(path, error.result, unwritten=str(error))
            else:
                encoders.evaluated(path, result)
        elif future.over:
            break
        else:
            pause(f"{run}: {future.state}; waiting for its next encoder")
    reason = f" ({future.reason})" if future.reason else ""
    evaluated = sum(encoders.good.values())
    failures = len(encoders.good) - evaluated
    failed = f", {failures} could not be" if failures else ""
    pages = f", {encoders.unwritten} pages could not be written" if encoders.unwritten else ""
    say(f"{run}: {future.state}{reason}; {evaluated} encoders evaluated{failed}{pages}")
    return 2 if failures or encoders.unwritten else 0


class _Encoders:
    """The encoders of a run, for rank 0. It says which is next, and what became of those before."""

    def __init__(self, run: Path, sets: Sets, settings: Settings, say: Say) -> None:
        self._run, self._settings, self._say = run, settings, say
        self._digests = sets.digests
        self._folder = board_folder(run, settings.layer)
        self._curves = Curves(self._folder)
        self._files: dict[Path, tuple[int, ...]] = {}  # as they were when they were last looked at
        self.good: dict[Path, bool] = {}  # whether an encoder has a result
        self.baselines: Baselines | None = None
        self.unwritten = 0  # pages

    def next(self) -> Path | None:
        """Find the oldest encoder without a result of these settings."""
        for path in encoders(self._run):
            stat = path.stat()
            file = stat.st_ino, stat.st_size, stat.st_mtime_ns
            if self._files.get(path) == file:
                continue
            self._files[path] = file
            try:
                result = read_result(result_path(path, layer=self._settings.layer))
            except DamagedError as error:
                self._say(str(error))
                return path
            if not result:
                return path
            if changed := difference(result, self._settings, encoder=file_digest(path), **self._digests):
                self._say(f"{path.stem}: evaluated before with {changed}: again")
                return path
            self._take_in(path, result, "evaluated before")
        return None

    def evaluated(self, path: Path, result: Result, *, unwritten: str = "") -> None:
        """Take the result of the encoder that was `next`. `unwritten` says why it has no page."""
        if unwritten:
            self.unwritten += 1
            self._say(unwritten)
        self._take_in(path, result, f"{result['seconds']['total']:.0f} s")

    def failed(self, path: Path, error: EncoderError) -> None:
        """Note that the encoder that was `next` has no result."""
        self.good[path] = False
        self._say(f"{path.stem}: cannot be evaluated: {error}")

    def _take_in(self, path: Path, result: Result, how: str) -> None:
        self.good[path] = True
        try:
            self._curves.add(result, result_path(path, layer=self._settings.layer).stat().st_mtime)
        except OSError as error:
            self._say(f"{self._folder}: cannot be written ({error.strerror}); tried again at the next encoder")
        parts = result["protocols"].items()
        tops = [f"{title(name)} {part['results'][TRAINED]['top1']:.2f} %" for name, part in parts]
        line = f"{path.stem}: {', '.join(tops) or 'signals, without labels'}"
        if self._settings.baselines:
            self.baselines = self.baselines or baselines(result)
            rows = [part["results"][UNTRAINED]["top1"] for _, part in parts if UNTRAINED in part["results"]]
            line += "; untrained " * bool(parts) + ", ".join(f"{top1:.2f}" for top1 in rows)
        self._say(f"{line}; {how}")


@contextmanager
def _alone(run: Path, pause: _Pause, say: Say) -> Iterator[None]:
    """Hold the run's lock for watchers. Waits for another process that has it; the lock ends with the process."""
    path = watchers_lock(run)
    with refusing(f"{path}: cannot be written"):
        path.parent.mkdir(exist_ok=True)
        file = path.open("a")

    def is_ours() -> bool:
        try:
            return lock(file.fileno())
        except OSError as error:  # the file system has no locks
            say(f"{path}: cannot be locked ({error.strerror}): see that no other process watches this run")
            return True

    with file:
        while not is_ours():
            who = path.read_text(errors="replace").strip() or "another process"
            pause(f"{run}: is watched by {who}; waiting for it to end")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
