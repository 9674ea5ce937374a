"""One server for all real processes of the tests. It has imported torch once and forks them: 0.1 s each and not 3, and each is
still a fresh process."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("simclr_dist.train.loop", "simclr_dist.evaluate.job", "simclr_dist.evaluate.finetune"),
        *("simclr_dist.convert.decoding", "webdataset.writer", "torch.distributed.nn", "torch._dynamo", "pytest"),
    ]
)


def start() -> None:
    """Before any test: a conversion in several processes would start a server that lacks most of this."""
    forkserver.ensure_running()


class Command:
    """`main(arguments)` in a process of its own that leads a session; much of what subprocess.Popen has.

    What it prints goes into two pipes, or all of it into the file `log`.
    """

    def __init__(
        self,
        main: Callable[[Sequence[str]], int],
        arguments: Sequence[object],
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        if log is not None:
            log.touch()
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        words = [str(argument) for argument in arguments]
        variables = {**os.environ, **(environment or {})}
        ends = [write for _, write in pipes]
        self._process = CONTEXT.Process(target=_run, args=(main, words, folder or Path.cwd(), variables, log, ends))
        self._process.start()
        self.pid = self._process.pid or 0
        for end in ends:
            end.close()
        self.stdout, self.stderr = (_text(read) for read, _ in pipes)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout or 0)
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def kill(self) -> None:
        """Of all that it has started too."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """To its end, which must come in this time; then what is still unread, which must be less than a pipe holds."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()
        self.stdout.close()
        self.stderr.close()


def completed(
    main: Callable[[Sequence[str]], int],
    arguments: Sequence[object],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """From start to end, killed when it takes longer."""
    with Command(main, arguments, folder, environment) as command:
        try:
            out, error = command.communicate(timeout)
        except subprocess.TimeoutExpired:
            command.kill()
            raise
        return subprocess.CompletedProcess(list(arguments), command.wait(), out, error)


def _text(read: Connection) -> IO[str]:
    file = os.fdopen(os.dup(read.fileno()), encoding="utf-8")
    read.close()
    return file


def _run(
    main: Callable[[Sequence[str]], int],
    arguments: list[str],
    folder: Path,
    variables: dict[str, str],
    log: Path | None,
    ends: list[Connection],
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ |= variables
    os.chdir(folder)
    for end, stream in zip(ends, (sys.stdout, sys.stderr), strict=True):
        os.dup2(end.fileno() if log is None else os.open(log, os.O_WRONLY | os.O_APPEND), stream.fileno())
        end.close()
    multiprocessing.set_start_method("fork", force=True)  # of reading processes; without it they get the server's
    tempfile.tempdir = None  # the server's
    try:
        sys.exit(main(arguments))
    finally:
        atexit._run_exitfuncs()
