"""The parent of torchrun: what it makes of an end, when it starts again, and what it refuses before anything starts."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import training_runs as runs
from ranks import free_port
from simclr_dist.cli.main import main
from simclr_dist.launch import torchrun as launcher
from simclr_dist.launch.rendezvous import Nodes
from simclr_dist.launch.torchrun import torchrun
from simclr_dist.run.claim import Claim, claim_run
from simclr_dist.run.status import End, leave_note, read_ledger, read_status, record_end, write_status
from simclr_dist.system.errors import LAST_WORD, ConfigError

COMMAND = ["-m", "simclr_dist.train", "config.yaml"]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Agent:
    """Stands for torchrun: each start does what the next of `ends` says, and returns its code."""

    def __init__(self, *ends: Callable[[], int]) -> None:
        self._ends = list(ends)
        self.commands: list[list[str]] = []
        self.environment: dict[str, str] = {}

    def __call__(self, command: Sequence[str], *, env: Mapping[str, str], tell: object = None, give_up: object = None) -> int:
        self.commands.append(list(command))
        self.environment = dict(env)
        return self._ends[len(self.commands) - 1]()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    monkeypatch.setattr(launcher, "time", clock)
    monkeypatch.setattr(launcher.signals, "listen", lambda: None)
    monkeypatch.setattr(launcher.signals, "requested", lambda: 0)
    Path("run/checkpoints").mkdir(parents=True)
    return clock


@pytest.fixture
def launched(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Agent]]:
    """`torchrun` with an agent that ends like this; its exit code, and the agent."""

    def launch(*ends: Callable[[], int], processes: int = 2, **more: Any) -> tuple[int, Agent]:
        agent = Agent(*ends)
        monkeypatch.setattr(launcher, "supervise", agent)
        return torchrun(processes, COMMAND, Path("run"), **more), agent

    return launch


def ends(state: str, code: int | None, *, saves: int = 0, agent: int = 1, reason: str = "why") -> Callable[[], int]:
    """A start whose rank 0 had the time to say what became of it; `saves` is the step of a new checkpoint."""

    def end() -> int:
        if saves:
            Path(f"run/checkpoints/step-{saves:08d}.json").write_text("{}")
        claim_run(Path("run")).release()
        write_status(Path("run"), state, code, reason=reason)
        return agent

    return end


def never_began() -> int:
    return 1


def ranks_were_there(command: Sequence[str]) -> None:
    """torchrun has made the folder for their logs."""
    (logs,) = (argument.partition("=")[2] for argument in command if argument.startswith("--log-dir="))
    Path(logs, "simclr_dist_x/attempt_0").mkdir(parents=True, exist_ok=True)


Launched = Callable[..., tuple[int, Agent]]


@pytest.mark.parametrize(
    ("state", "code", "agent"),
    [("done", 0, 0), ("preempted", 75, 0), ("preempted", 75, 1), ("failed", 2, 1), ("diverged", 3, 1)],
)
def test_the_code_is_the_runs_and_these_ends_are_final(launched: Launched, state: str, code: int, agent: int) -> None:
    found, started = launched(ends(state, code, agent=agent), max_restarts=3)
    assert (found, len(started.commands)) == (code, 1)
    assert read_ledger(Path("run")) == []


def test_crashes_without_a_new_checkpoint_count(
    launched: Launched, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    crash = ends("crashed", 1, reason="RuntimeError: x")
    found, agent = launched(crash, crash, crash, max_restarts=2)
    assert (found, len(agent.commands)) == (1, 3)
    entries = [(entry["event"], entry.get("fruitless"), entry.get("launcher_job")) for entry in read_ledger(Path("run"))]
    assert entries == [("restart", 1, "7"), ("restart", 2, "7"), ("gave_up", 3, "7")]
    assert clock.now == pytest.approx(2 + 4, abs=0.5), "a pause that grows"
    again = "simclr-dist: RuntimeError: x; starting again from step 0\n"
    assert capsys.readouterr().err == again * 2 + "simclr-dist: RuntimeError: x; given up (--max-restarts 2)\n"
    found, agent = launched(crash, max_restarts=0)
    assert (found, len(agent.commands)) == (1, 1)


def test_crashes_with_one_do_not(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    crashes = [ends("crashed", 1, saves=step) for step in range(5, 45, 5)]
    found, agent = launched(*crashes, ends("done", 0, agent=0), max_restarts=1)
    assert (found, len(agent.commands)) == (0, 9)
    assert {entry["fruitless"] for entry in read_ledger(Path("run"))} == {0}
    assert "starting again from step 40" in capsys.readouterr().err


def test_one_that_dies_without_a_word_is_a_crash(launched: Launched) -> None:
    def killed() -> int:
        claim = claim_run(Path("run"))
        claim.beat(7)
        write_status(Path("run"), "running", None)
        claim.release()
        return -9

    found, agent = launched(killed, never_began, ends("done", 0, agent=0), max_restarts=2)
    assert (found, len(agent.commands)) == (0, 3)
    stop, first, second = read_ledger(Path("run"))
    assert (stop["event"], stop["state"], stop["step"]) == ("stop", "crashed", 7)
    assert (first["why"], second["why"]) == ("ended without a word: killed, or cut off", "the ranks ended with 1")


LOST = End("crashed", 1, "LostRankError: Connection reset by peer", lost=True)
MEMORY = End("crashed", 1, "OutOfMemoryError: CUDA")
SERVER = End("crashed", 1, "ConnectionResetError: the server of the shards: gloo, nccl, timed out")
KILLED = End("crashed", 1, "ended without a word: killed, or cut off", lost=True)


@pytest.mark.parametrize(
    ("end", "notes", "gone", "expected"),
    [
        (LOST, {0: LOST}, [1], "rank 1 on .* was killed"),
        (LOST, {0: LOST, 1: MEMORY}, [1], "rank 1: OutOfMemoryError: CUDA"),
        (LOST, {0: LOST, 1: LOST}, [1], "LostRankError: Connection"),
        (LOST, {0: LOST}, [], "LostRankError: Connection"),
        (KILLED, {}, [0], "rank 0 on .* was killed"),
        (MEMORY, {0: MEMORY}, [0, 1], "OutOfMemoryError: CUDA"),
        (LOST, {0: LOST, 1: SERVER}, [1], "rank 1: ConnectionResetError"),
        (SERVER, {0: SERVER}, [1], "ConnectionResetError"),
    ],
    ids=[
        "killed", "out of memory", "on another machine", "all at once", "rank 0", "its own fault",
        "in words like a lost rank's", "rank 0, in words like a lost rank's",
    ],
)  # fmt: skip
def test_the_reason_is_that_of_the_rank_that_went_first(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, end: End, notes: dict[int, End], gone: list[int], expected: str
) -> None:
    """And not that of the others, which have lost a connection."""

    def supervise(command: Sequence[str], *, env: Mapping[str, str], tell: object, give_up: Callable[[int], bool]) -> int:
        for there in ([0, 1], sorted({0, 1} - set(gone)), []):
            monkeypatch.setattr(launcher, "children", lambda _, there=there: [100 + rank for rank in there])
            give_up(0)
        for rank, note in notes.items():
            with monkeypatch.context() as of_rank:
                of_rank.setenv(LAST_WORD, env[LAST_WORD])
                of_rank.setenv("RANK", str(rank))
                leave_note(note)
        claim = claim_run(Path("run"))
        record_end(Path("run"), claim.generation, end)
        claim.release()
        return 1

    monkeypatch.setattr(launcher, "supervise", supervise)
    monkeypatch.setattr(launcher, "_rank", lambda process: process - 100)
    assert torchrun(2, COMMAND, Path("run")) == 1
    assert re.match(expected, read_status(Path("run"))["reason"])
    assert re.match(expected, read_ledger(Path("run"))[-1]["why"])


def joined(
    monkeypatch: pytest.MonkeyPatch, endings: Sequence[list[int]], stopped: Callable[[], object], after: Callable[[], object]
) -> None:
    """An agent of two ranks that stops them, for a machine that joins; the new ones end as `endings` has it."""

    def supervise(command: Sequence[str], *, env: Mapping[str, str], tell: object, give_up: Callable[[int], bool]) -> int:
        ranks_were_there(command)

        def look(base: int, alive: list[int]) -> None:
            monkeypatch.setattr(launcher, "children", lambda _: [base + rank for rank in alive])
            give_up(0)

        for alive in ([0, 1], [1], []):
            look(100, alive)
        stopped()
        for alive in endings:
            look(200, alive)
        after()
        return 1

    monkeypatch.setattr(launcher, "supervise", supervise)
    monkeypatch.setattr(launcher, "_rank", lambda process: process % 100)


def end_of_start(end: End) -> None:
    claim = claim_run(Path("run"))
    record_end(Path("run"), claim.generation, end)
    claim.release()


STOPPED = End("preempted", 75, "SIGTERM")
ELASTIC = Nodes(1, 2, "127.0.0.1:29500", 0.001)


@pytest.mark.parametrize("endings", [[[0, 1], []], [[1], []], [[], [0, 1], []]], ids=["both", "one is seen late", "a gap"])
def test_a_loss_after_a_join_is_told_as_what_it_is(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, endings: Sequence[list[int]]
) -> None:
    """The ranks that went first when all were stopped for it have nothing to do with that."""
    joined(monkeypatch, endings, lambda: end_of_start(STOPPED), lambda: end_of_start(LOST))
    assert torchrun(2, COMMAND, Path("run"), nodes=ELASTIC) == 1
    assert read_status(Path("run"))["reason"] == LOST.why


def test_a_crash_after_a_join_is_not_the_stop_before(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the machine that has joined cannot work: the stop was for it alone."""
    joined(monkeypatch, [[0, 1], []], lambda: end_of_start(STOPPED), lambda: None)
    assert torchrun(2, COMMAND, Path("run"), nodes=ELASTIC) == 1
    assert capsys.readouterr().err == "simclr-dist: the ranks ended with 1; given up (--max-restarts 0)\n"


def test_ranks_that_end_before_they_begin_are_told_in_their_own_words(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They leave notes, and nothing in the run folder. The lost connection of another is not the reason."""

    def supervise(command: Sequence[str], *, env: Mapping[str, str], **more: object) -> int:
        for rank, end in enumerate((LOST, MEMORY)):
            Path(f"{env[LAST_WORD]}.{rank}").write_text(json.dumps(asdict(end)))
        return 1

    monkeypatch.setattr(launcher, "supervise", supervise)
    assert torchrun(2, COMMAND, Path("run")) == 1
    line = "rank 1: OutOfMemoryError: CUDA"
    assert capsys.readouterr().err == f"simclr-dist: {line}; given up (--max-restarts 0)\n"
    assert read_ledger(Path("run"))[-1]["why"] == line


def test_what_an_earlier_start_said_is_not_this_ones(launched: Launched) -> None:
    for state, code in (("done", 0), ("failed", 2)):
        ends(state, code)()
        assert launched(never_began)[0] == 1
        assert launched(lambda: 0)[0] == 0


def test_an_earlier_start_may_be_heard_of_late(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, when our ranks wait for theirs already: no reason to give up. What becomes of this start is one."""
    monkeypatch.setattr(launcher, "children", lambda agent: [1])
    monkeypatch.setattr(launcher, "_rank", lambda process: 0)
    ends("running", None)()

    def supervise(command: Sequence[str], *, env: object, tell: object, give_up: Callable[[int], bool]) -> int:
        ranks_were_there(command)
        write_status(Path("run"), "crashed", 1)
        for _ in range(20):
            clock.sleep(1)
            assert not give_up(0)
        ends("crashed", 1)()
        clock.sleep(1)
        assert not give_up(0), "torchrun may notice by itself"
        clock.sleep(6)
        assert give_up(0)
        return -9

    monkeypatch.setattr(launcher, "supervise", supervise)
    assert torchrun(1, COMMAND, Path("run"), nodes=Nodes(2, 2, "127.0.0.1:29500")) == 1


@pytest.mark.parametrize(("end", "code"), [(never_began, 75), (ends("crashed", 1), 1), (ends("preempted", 75), 75)])
def test_after_a_stop_signal_nothing_starts_again(
    launched: Launched, monkeypatch: pytest.MonkeyPatch, end: Callable[[], int], code: int
) -> None:
    monkeypatch.setattr(launcher.signals, "requested", lambda: 15)
    found, agent = launched(end, max_restarts=3)
    assert (found, len(agent.commands)) == (code, 1)


def test_a_stop_signal_in_the_pause_is_not_waited_with(
    launched: Launched, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.signals, "requested", lambda: 15 if clock.now > 0 else 0)
    found, agent = launched(never_began, max_restarts=9)
    assert (found, len(agent.commands)) == (75, 1)
    assert clock.now < 0.5


def test_a_run_that_another_start_has_taken_over_is_left_alone(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank's note is final, and says nothing in a folder that belongs to another."""
    taken: list[Claim] = []
    words: list[Path] = []

    def taken_over() -> int:
        write_status(Path("run"), "running", None)
        taken.append(claim_run(Path("run")))
        Path(f"{words[0]}.0").write_text(json.dumps({"state": "failed", "code": 2, "why": "taken over"}))
        return 1

    class Told(Agent):
        def __call__(self, command: Sequence[str], *, env: Mapping[str, str], **more: Any) -> int:
            words.append(Path(env[LAST_WORD]))
            return super().__call__(command, env=env, **more)

    agent = Told(taken_over)
    monkeypatch.setattr(launcher, "supervise", agent)
    assert torchrun(2, COMMAND, Path("run"), max_restarts=3) == 2
    assert len(agent.commands) == 1
    assert read_status(Path("run"))["state"] == "running"
    taken[0].release()


def test_one_rank_needs_no_torchrun(launched: Launched) -> None:
    crash = ends("crashed", 1)
    found, agent = launched(crash, ends("done", 0, agent=0), processes=1, max_restarts=2)
    assert found == 0
    assert agent.commands == [[sys.executable, *COMMAND]] * 2, "and is started again like others"


def test_what_torchrun_is_given(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("simclr_dist.system.machine.cores", lambda: 16)
    _, agent = launched(ends("done", 0), processes=3)
    (command,) = agent.commands
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=3", "--max-restarts=0"} < set(command)
    assert command[-3:] == COMMAND
    assert agent.environment["OMP_NUM_THREADS"] == "5"
    assert agent.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PET_NNODES", "2")  # of a platform
    _, agent = launched(ends("done", 0), nodes=Nodes(1, 3, "127.0.0.1:29500"))
    (command,) = agent.commands
    assert {
        "--nnodes=1:3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:29500",
        "--rdzv-id=simclr_dist",
        "--rdzv-conf=is_host=1",
        "--local-addr=127.0.0.1",
    } < set(command)
    assert "--standalone" not in command
    assert "PET_NNODES" not in agent.environment, "it would wait for a machine"
    assert agent.environment["OMP_NUM_THREADS"] == "2"

    with pytest.raises(ConfigError, match=r"--rdzv-endpoint: 'localhost:abc' is no HOST:PORT that can be used from here"):
        launched(ends("done", 0), nodes=Nodes(2, 2, "localhost:abc"))


@pytest.mark.slow
@pytest.mark.parametrize("meet", [False, True], ids=["this machine", "machines that meet"])
def test_ranks_that_die_at_once_are_given_up(tmp_path: Path, meet: bool) -> None:
    """With the real torchrun, and ranks that are gone before anybody looks; one of these runs has a folder already."""
    nodes = Nodes(1, 1, f"127.0.0.1:{free_port()}", 0.5) if meet else None
    if not meet:
        (tmp_path / "run").mkdir()
    (tmp_path / "rank.py").write_text("import os; os._exit(3)")
    code = (
        "import sys\nfrom pathlib import Path\nfrom simclr_dist.launch.rendezvous import Nodes\n"
        "from simclr_dist.launch.torchrun import torchrun\n"
        f"sys.exit(torchrun(2, ['rank.py'], Path('run'), nodes={nodes!r}, max_restarts=1))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("simclr-dist: ", "WARNING: "))]
    assert said == [
        "simclr-dist: the ranks ended with 1; starting again from step 0",
        "simclr-dist: the ranks ended with 1; given up (--max-restarts 1)",
    ]
    assert [entry["event"] for entry in read_ledger(tmp_path / "run")] == ["restart", "gave_up"] * (not meet)
    assert read_status(tmp_path / "run") == {}


LATE_RANK = """
import subprocess, sys, time
time.sleep(0.5)
child = subprocess.run([sys.executable, "-c", "from simclr_dist.system import signals; import time; signals.listen();"
    "time.sleep(0.5); print(signals.requested())"])
"""


def test_a_rank_that_starts_after_the_signal_hears_of_it(tmp_path: Path) -> None:
    """torchrun imports torch for seconds before it starts the ranks."""
    (tmp_path / "agent.py").write_text(LATE_RANK)
    code = (
        "import os, sys\nfrom simclr_dist.launch import supervisor\n"
        "from simclr_dist.system import signals\nsignals.listen()\nos.kill(os.getpid(), 10)\n"
        "supervisor.supervise([sys.executable, sys.argv[1]], tell=supervisor.children)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "agent.py"], capture_output=True, text=True, check=True)
    assert done.stdout == "10\n"


SLOW_RANK = """
import os, time
from pathlib import Path
from simclr_dist.system import signals
agent = os.getppid()
Path("new").write_text(str(os.getpid()))
Path("new").rename("rank")
while os.getppid() == agent:
    time.sleep(0.01)
signals.die_with_torchrun()
Path("outlived").touch()
"""


def test_a_rank_that_starts_after_the_end_of_torchrun_ends_too(tmp_path: Path) -> None:
    """Its parent is another process then, which does not end."""
    (tmp_path / "rank.py").write_text(SLOW_RANK)
    code = "from simclr_dist.launch.torchrun import torchrun\ntorchrun(1, ['rank.py'])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as started:
        runs.until(lambda: (tmp_path / "rank").exists())
        started.send_signal(signal.SIGINT)
        assert started.communicate()[1].endswith("KeyboardInterrupt\n")
    runs.until(lambda: runs.state_of(int((tmp_path / "rank").read_text())) in ("", "Z"))
    assert not (tmp_path / "outlived").exists()


# The command line


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_shards(tmp_path_factory.mktemp("images"), images=30)


@pytest.fixture
def refused(shards: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The line with which `simclr-dist train` refuses these arguments, and nothing is started."""
    Path("run/checkpoints").rmdir()
    Path("run").rmdir()
    runs.write_config(Path(), shards)
    monkeypatch.setattr(launcher, "supervise", lambda *_, **__: pytest.fail("something was started"))

    def refused(*arguments: str) -> str:
        try:
            code = main(["train", "config.yaml", *arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        assert not Path("run").exists()
        assert err.startswith("simclr-dist: ")
        return str(err.removeprefix("simclr-dist: ").rstrip("\n"))

    return refused


HOST = ("--rdzv-endpoint", "n1:29500")


@pytest.mark.parametrize("nodes", ["0", "x", "3:1", "1:", ":2", "1:2:3", "-1"])
def test_a_number_of_machines_that_is_none(refused: Callable[..., str], nodes: str) -> None:
    assert refused(f"--nnodes={nodes}", *HOST) == (
        f"argument --nnodes: {nodes!r} is neither a number of machines nor MIN:MAX; see `simclr-dist train --help`"
    )


def test_a_meeting_of_one_machine(refused: Callable[..., str]) -> None:
    assert refused(*HOST) == "--rdzv-endpoint goes with --nnodes: say how many machines there are"


def test_many_machines_that_do_not_know_where_to_meet(refused: Callable[..., str]) -> None:
    assert refused("--nnodes", "2") == "--nnodes needs --rdzv-endpoint HOST:PORT: one of the machines, and a free port there"


def test_a_batch_that_some_number_of_machines_does_not_divide(refused: Callable[..., str]) -> None:
    line = "global_batch_size: 20 is not divided by {} processes x 1 micro_batches; {} would be"
    batch = ("--global-batch-size", "20")
    assert refused("--nnodes", "1:3", *HOST, *batch) == line.format(3, 18)
    assert refused("--nnodes", "1:2", "--processes", "3", *HOST, *batch) == line.format(3, 18)
    assert refused("--nnodes", "1:3", "--processes", "2", *HOST, *batch) == line.format(6, 18)
    assert refused("--nnodes", "3", *HOST, *batch) == line.format(3, 18)


def test_one_that_all_divide_is_started(
    shards: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run/checkpoints").rmdir()
    runs.write_config(Path(), shards)
    agent = Agent(lambda: 0)
    monkeypatch.setattr(launcher, "supervise", agent)
    more = ["--nnodes", "1:3", "--rdzv-endpoint", "127.0.0.1:29500", "--processes", "2", "--global-batch-size", "24"]
    assert main(["train", "config.yaml", *more]) == 0, capsys.readouterr().err
    assert {"--nnodes=1:3", "--rdzv-conf=is_host=1"} < set(agent.commands[0])
    assert agent.commands[0][-4:] == ["simclr_dist.train", "config.yaml", "--global-batch-size", "24"]


def test_a_process_whose_environment_is_forbidden_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of one that has just ended is to all but root."""

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert launcher._rank(1) is None
