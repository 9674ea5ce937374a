"""Ranks that do not meet: each says for whom it waits, in one line, and none is deaf meanwhile."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from forkserver import Command
from simclr_dist.cli.exits import exit_code
from simclr_dist.method import meeting
from simclr_dist.method.distributed import all_gather_objects, process_group
from simclr_dist.system import signals
from training_runs import until

MINUTES = 0.02


def join(arguments: Sequence[str]) -> int:
    """A rank that says after 0.3 s for whom it waits, and then meets the others."""
    meeting._SAY_SECONDS, meeting._TRY_SECONDS = 0.3, 0.5
    meeting._STOP_SECONDS = float(os.environ.get("STOP_SECONDS", "0.2"))
    signals.listen()

    def work() -> int:
        with process_group("cpu", float(arguments[0])) as world:
            all_gather_objects(world.rank)
        return 0

    return exit_code(work)


@contextmanager
def started(port: int, *ranks: int, size: int = 2, minutes: float = MINUTES, **variables: str) -> Iterator[list[Command]]:
    where = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size), "MASTER_PORT": str(port), **variables}
    with ExitStack() as stack:
        commands = [Command(join, [minutes], environment={**where, "RANK": str(rank)}) for rank in ranks]
        for command in commands:
            stack.enter_context(command)
            stack.callback(command.kill)
        yield commands


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ends(command: Command) -> tuple[int, list[str]]:
    error = command.communicate(60)[1]
    return command.wait(), [line for line in error.splitlines() if "c10d" not in line]  # torch's own log


ALONE = "to run alone, unset RANK, WORLD_SIZE and LOCAL_RANK"


def test_for_whom_a_rank_waits(port: int) -> None:
    """For the master, or for the others, by number; and no longer than it says."""
    where = f"at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT)"
    refused = f"rank 0 (Connection refused) {where}"
    with started(port, 1) as (rank,):
        assert ends(rank) == (2, [
            f"simclr-dist: rank 1 of 2 waits for {refused}, {MINUTES} minutes at most; {ALONE}",
            f"simclr-dist: rank 1 of 2 has waited {MINUTES} minutes for {refused}; {ALONE}",
        ])  # fmt: skip
    with started(port, 0, 2, size=4) as ranks:
        for number, rank in zip((0, 2), ranks, strict=True):
            line = f"simclr-dist: rank {number} of 4 waits for ranks 1, 3 {where}, {MINUTES} minutes at most; {ALONE}\n"
            assert rank.stderr.readline() == line
        last = f"simclr-dist: rank 0 of 4 has waited {MINUTES} minutes for ranks 1, 3 {where}; {ALONE}"
        assert ends(ranks[0]) == (2, [last])


def test_the_master_goes_while_others_are_waited_for(port: int) -> None:
    """Killed, or it has waited long enough."""
    with started(port, 0, 1, size=3, minutes=5) as (master, rank):
        assert "waits for rank 2" in rank.stderr.readline()
        master.kill()
        code, lines = ends(rank)
    (line,) = [line for line in lines if line.startswith("simclr-dist: ")]
    assert code == 2
    assert line.startswith("simclr-dist: rank 1 of 3 waited for the others, and then rank 0 was gone: ")


def test_where_ranks_are_restarted_the_first_speaks_and_it_is_a_crash(port: int) -> None:
    with started(port, 0, 1, size=3, TORCHELASTIC_RUN_ID="x") as ranks:
        (code, lines), (other, silent) = map(ends, ranks)
    assert (code, other) == (1, 1)
    line = (
        f"simclr-dist: rank 0 of 3 waits for rank 2 at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), {MINUTES} minutes at most"
    )
    assert lines[0] == line
    assert "LostRankError" in lines[-1]
    assert not [text for text in silent if text.startswith("simclr-dist: ")]


def test_late_ranks_are_met(port: int) -> None:
    with started(port, 1, minutes=1) as (early,):
        assert "waits for rank 0" in early.stderr.readline()
        with started(port, 0, minutes=1) as (late,):
            assert (ends(early), ends(late)) == ((0, []), (0, []))


def test_something_else_listens_there(port: int) -> None:
    """And takes connections without a word."""
    with socket.create_server(("127.0.0.1", port)), started(port, 1) as (rank,):
        code, lines = ends(rank)
    assert code == 2
    assert re.match(r"simclr-dist: rank 1 of 2 waits for rank 0 \(.+\) at 127\.0\.0\.1:", lines[0])
    assert len(lines) == 2


def test_a_port_in_use(port: int) -> None:
    line = f"MASTER_PORT: {port}: is in use on this machine; take another, or end what has it"
    with socket.create_server(("127.0.0.1", port)):
        with started(port, 0, minutes=1) as (rank,):
            assert ends(rank) == (2, [f"simclr-dist: {line}"])
        with started(port, 0, minutes=1, SLURM_JOB_ID="7") as (rank,):  # another start has another port
            assert ends(rank) == (1, [f"simclr-dist: {line}"])
        torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        with started(port, 0, minutes=1, **torchrun) as (rank,):  # which has chosen it, and chooses another
            code, lines = ends(rank)
            assert (code, lines[-1]) == (1, f"simclr_dist.system.errors.LostRankError: {line}")


@pytest.mark.parametrize("name", ["no-such-machine.invalid", "a" * 70, "-"])
def test_a_master_that_nobody_knows(port: int, name: str) -> None:
    """A typo, or a name server that is silent for a moment."""
    for rank in (0, 1):
        with started(port, rank, minutes=1, MASTER_ADDR=name) as (only,):
            code, lines = ends(only)
            assert (code, len(lines)) == (2, 1)
            assert re.fullmatch(f"simclr-dist: MASTER_ADDR: '{name}': .*; name the machine of rank 0", lines[0])
    with started(port, 1, SLURM_JOB_ID="7", MASTER_ADDR=name) as (only,):
        code, lines = ends(only)
        assert code == 1
        assert re.match(r"simclr-dist: rank 1 of 2 waits for rank 0 \(.+\) at ", lines[0])


def test_a_stop_signal_is_heard(port: int) -> None:
    for rank in (0, 1):
        with started(port, rank, minutes=5) as (only,):
            assert "waits for rank" in only.stderr.readline()
            began = time.monotonic()
            os.kill(only.pid, signal.SIGTERM)
            code, lines = ends(only)
            assert (code, len(lines)) == (75, rank == 0), "rank 0 speaks for all"
            assert not lines or lines[0].startswith("simclr-dist: stopped by SIGTERM before the ranks had met")
            assert time.monotonic() - began < 30


def test_one_that_is_just_before_the_others_come_does_not_keep_them_waiting(port: int) -> None:
    """They meet, and can agree to stop."""
    with started(port, 0, minutes=5, STOP_SECONDS="60") as (first,):
        until(lambda: _is_open(port))
        os.kill(first.pid, signal.SIGUSR1)
        with started(port, 1, minutes=5) as (second,):
            assert (ends(first)[0], ends(second)[0]) == (0, 0)


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
