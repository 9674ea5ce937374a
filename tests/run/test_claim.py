"""Who writes into a run folder: one start at a time, and an older one nothing more."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simclr_dist.run import claim
from simclr_dist.system.errors import ConfigError, TakenOverError


def other(code: str, **environment: str) -> subprocess.Popen[str]:
    """Another process, with `run` and `claim` at hand."""
    text = "import os, sys, time\nfrom pathlib import Path\nfrom simclr_dist.run import claim\n"
    text += f"run = Path(sys.argv[1])\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", text, "."],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def holder(**environment: str) -> subprocess.Popen[str]:
    process = other("c = claim.claim_run(run); c.beat(7); print(c.generation, flush=True); time.sleep(60)", **environment)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_starts_are_numbered_and_beats_are_read() -> None:
    run = Path()
    assert claim.heartbeat(run) == {}
    first = claim.claim_run(run)
    first.beat(12)
    beat = claim.heartbeat(run)
    assert (beat["generation"], beat["step"], beat["ended"]) == (1, 12, False)
    first.beat(9, ended=True)
    assert (claim.heartbeat(run)["step"], claim.heartbeat(run)["ended"]) == (9, True)
    first.release()
    second = claim.claim_run(run)
    assert second.generation == 2
    second.release()


def test_a_second_start_is_refused_while_the_first_lives() -> None:
    process = holder()
    try:
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} on .*, since .*; stop that one first"):
            claim.refuse_if_held(Path())
        with pytest.raises(ConfigError, match="in use by process"):
            claim.claim_run(Path())
        assert claim.is_held(Path())
    finally:
        end(process)
    assert not claim.is_held(Path())
    claim.refuse_if_held(Path())
    held = claim.claim_run(Path())
    assert held.generation == 2
    held.release()


def test_who_only_looks_is_no_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for another who looks in the same moment; and whoever claims the folder waits for both."""
    claim.claim_run(Path()).release()
    real, seen = claim.files.lock, list[bool]()

    def locked_and_looked_at(descriptor: int, **how: bool) -> bool:
        answer = real(descriptor, **how)
        with monkeypatch.context() as inner:
            inner.setattr(claim.files, "lock", real)
            seen.append(claim.is_held(Path()))
        return answer

    monkeypatch.setattr(claim.files, "lock", locked_and_looked_at)
    assert not claim.is_held(Path())
    assert claim.is_dead(Path())
    assert seen == [False, False]


def test_of_many_at_once_one_wins() -> None:
    racers = [other("claim.claim_run(run); print('mine', flush=True); time.sleep(8)") for _ in range(4)]
    results = [racer.communicate() for racer in racers]
    assert sorted(out for out, _ in results) == ["", "", "", "mine\n"]
    assert sum("in use by" in error for _, error in results) == 3


def test_a_start_of_the_same_job_takes_over_and_the_older_one_writes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    process = other(
        "c = claim.claim_run(run); print(1, flush=True); sys.stdin.readline()\ntry:\n    c.check()\n"
        "except claim.TakenOverError as error:\n    print(error)",
        SLURM_JOB_ID="7",
    )
    assert process.stdout is not None
    process.stdout.readline()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match="in use by process"):
        claim.claim_run(Path())  # another process of the same start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    claim.refuse_if_held(Path())
    held = claim.claim_run(Path())
    held.check()
    out, _ = process.communicate("\n")
    assert "taken over by process" in out
    assert ", SLURM job 7" in out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(TakenOverError, match="this start ends"):
        claim.claim_run(Path())  # the older one must not take it back
    held.release()


def test_check_sees_a_later_start() -> None:
    first = claim.claim_run(Path())
    first.check()
    first.release()
    second = claim.claim_run(Path())
    second.check()
    with pytest.raises(TakenOverError, match=r"run_folder: '\.' was taken over by"):
        first.check()
    second.release()


def test_a_reading_process_does_not_keep_the_lock() -> None:
    """It is forked from the rank and outlives its kill for seconds."""
    held = claim.claim_run(Path())
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    try:
        held.release()
        claim.claim_run(Path()).release()
    finally:
        child.kill()
        child.join()


def elsewhere(beat_age: float, *, ended: bool = False) -> None:
    """A start on another machine, whose lock does not reach here."""
    held = claim.claim_run(Path())
    held.beat(5, ended=ended)
    held.release()
    path = Path("starts/00000001.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "far"}))
    beat = json.loads(Path("heartbeat").read_text())
    Path("heartbeat").write_text(json.dumps(beat | {"time": time.time() - beat_age}))
    os.utime(path, (time.time() - beat_age,) * 2)


@pytest.mark.parametrize("system", ["nfs4", "lustre", ""])
def test_on_a_shared_file_system_a_silent_machine_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], system: str
) -> None:
    monkeypatch.setattr(claim, "_file_system", lambda _: system)
    monkeypatch.setattr(claim, "STALE_SECONDS", 3.0)
    elsewhere(beat_age=0.5)
    began = time.monotonic()
    claim.claim_run(Path()).release()
    assert 2 < time.monotonic() - began < 60
    assert "on far, since" in capfd.readouterr().err


def test_dead_is_said_of_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert claim.is_dead(Path()), "nobody has started yet"
    process = holder()
    assert not claim.is_dead(Path())
    end(process)
    assert claim.is_dead(Path())
    monkeypatch.setattr(claim, "_file_system", lambda _: "nfs4")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert not claim.is_dead(Path()), "its lock may not reach us, and it was heard of a moment ago"
    monkeypatch.setattr(claim, "STALE_SECONDS", 0.0)
    assert claim.is_dead(Path())


def test_a_start_that_has_not_signed_yet_is_waited_for() -> None:
    """Between the creation of its file and the lock it could be taken for dead."""
    Path("starts").mkdir()
    Path("starts/00000001.json").touch()
    began = time.monotonic()
    claim.claim_run(Path()).release()
    assert 4 < time.monotonic() - began < 60


def test_one_that_said_it_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_file_system", lambda _: "nfs4")
    elsewhere(beat_age=0.5, ended=True)
    began = time.monotonic()
    claim.claim_run(Path()).release()
    assert time.monotonic() - began < 20


def test_on_a_file_system_of_one_machine_the_lock_is_the_truth() -> None:
    """Containers of one machine have names of their own."""
    if claim._file_system(Path()) not in claim._ONE_MACHINE:
        pytest.skip("the temporary folder is not on a local file system")
    elsewhere(beat_age=0.5)
    began = time.monotonic()
    claim.claim_run(Path()).release()
    assert time.monotonic() - began < 20


def test_one_that_still_beats_elsewhere_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_file_system", lambda _: "nfs4")
    elsewhere(beat_age=1.0)
    beating = other(
        "import json\nfor _ in range(40):\n    b = json.loads(Path('heartbeat').read_text())\n"
        "    Path('heartbeat').write_text(json.dumps(b | {'time': time.time()})); time.sleep(0.2)"
    )
    try:
        with pytest.raises(ConfigError, match=r"in use by process .* on far"):
            claim.claim_run(Path())
    finally:
        end(beating)


def test_a_killed_process_frees_the_folder() -> None:
    process = holder()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    began = time.monotonic()
    claim.claim_run(Path()).release()
    assert time.monotonic() - began < 20
