"""SLURM's programs, each asked in bounded time: what a job's state is, to start it again, to cancel it."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError

GONE, UNKNOWN = "GONE", "UNKNOWN"
_OVER = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED"),
        *("TIMEOUT", GONE),
    }
)
# What no second try changes; while a controller is away its programs find many words for it.
_REFUSALS = ("invalid job id", "disabled", "denied", "already completing or completed", "not permitted")


@dataclass(frozen=True)
class JobState:
    """SLURM's word for a job, or GONE when no part of SLURM knows it any more, or UNKNOWN when no part answers."""

    name: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    source: str = ""

    @property
    def over(self) -> bool:
        """Whether the job has ended for good; False also where that is unknown."""
        return self.name in _OVER

    def __str__(self) -> str:
        parts = [self.name, f"({self.reason})" if self.reason else "", f"on {self.nodes}" if self.nodes else "", self.elapsed]
        return " ".join(part for part in parts if part) + (f", says {self.source}" if self.source else "")


@dataclass(frozen=True)
class Answer:
    """Of a program: its exit code, what it printed, and the last line of its complaints."""

    code: int | None  # None: none in time
    out: str
    said: str


def require(*programs: str) -> None:
    """Raises ConfigError when a program of SLURM is not on PATH."""
    for program in programs:
        if shutil.which(program) is None:
            raise ConfigError(f"SLURM is not here: no {program} on PATH; do this on a login node of the cluster")


def state(job_id: str, *, seconds: float = 3.5) -> JobState:
    """Ask squeue, then scontrol, then sacct, until one knows; answers within `seconds`, whatever they do."""
    deadline = time.monotonic() + seconds
    forgotten, said = False, []
    for program, arguments, read, share in _ASKED:
        answer = ask([program, *(part.replace("JOB", job_id) for part in arguments)], min(share, deadline - time.monotonic()))
        if answer.code == 0 and (found := read(answer.out)):
            return found
        # The controller forgets jobs that ended some minutes ago; accounting, if there is any, remembers.
        forgotten = forgotten or "Invalid job id" in answer.said
        said.append(f"{program}: {answer.said or 'does not know it'}")
    return JobState(GONE, "no longer known") if forgotten else JobState(UNKNOWN, "; ".join(said))


def states(job_ids: Sequence[str]) -> list[JobState]:
    """The states of several jobs, in the time that one takes."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(state, job_ids))


def overtaken(job_id: str, *, seconds: float = 2.0) -> Literal["cancelled", "requeued"] | None:
    """Whether somebody else has ended the job that this process is part of; None also when SLURM does not say."""
    answer = ask(["scontrol", "show", "job", "--oneliner", job_id], seconds)
    found, restarts = _from_scontrol(answer.out), re.search(r" Restarts=([0-9]+) ", answer.out)
    if found is None or restarts is None:
        return None
    if int(restarts[1]) > int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        return "requeued"
    # A cancelled job is COMPLETING until its last process is gone, and only at a time limit is there a reason.
    return "cancelled" if found.name in ("COMPLETING", "CANCELLED") and found.reason != "TimeLimit" else None


def requeue(job_id: str, *, seconds: float = 60.0) -> str | None:
    """Have the job that this process is part of start again; None when that is so, also by somebody else, otherwise why not.

    Tries for `seconds` while the controller does not answer. A job that was cancelled is left alone: SLURM would revive it.
    """
    deadline = time.monotonic() + seconds
    while True:
        if fate := overtaken(job_id):
            return None if fate == "requeued" else "the job was cancelled"
        answer = ask(["scontrol", "requeue", job_id], max(deadline - time.monotonic(), 1.0))
        if answer.code == 0 or "pending execution" in answer.said:
            return None
        if answer.code == 127 or any(words in answer.said.lower() for words in _REFUSALS) or time.monotonic() >= deadline:
            return f"scontrol: {answer.said}"
        time.sleep(min(1.0, seconds / 10))


def cancel(job_ids: Sequence[str], *, seconds: float = 30.0) -> str | None:
    """Cancel jobs, those that have ended too; None when that is accepted, otherwise why not."""
    answer = ask(["scancel", *job_ids], seconds)
    return None if answer.code == 0 else f"scancel: {answer.said}"


def ask(command: Sequence[str], seconds: float) -> Answer:
    """Run a program so that it can be ended with all it has started, and so that the signals which a requeue sends to every
    process of the job do not end the request for it."""
    # The user's habits for these programs' tables would change what they answer.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    if seconds <= 0:
        return Answer(None, "", "not asked, no time was left")
    try:
        with signals.blocked():
            program = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
                env=environment,
            )
    except OSError as error:
        return Answer(127, "", error.strerror or str(error))
    with program:
        try:
            out, said = program.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, signal.SIGKILL)
            return Answer(None, "", f"no answer in {seconds:.1f} s")
    lines = said.strip().splitlines() or [f"ended with {program.returncode}"] * bool(program.returncode)
    return Answer(program.returncode, out, re.sub(r"^\w+: (error|fatal): ", "", lines[-1]) if lines else "")


def _from_squeue(out: str) -> JobState | None:
    found = re.fullmatch(r"(\w+)\|(.*)\|(.*)\|(.*)", out.strip())
    return JobState(found[1], _word(found[2]), _word(found[3]), found[4], "squeue") if found else None


def _from_scontrol(out: str) -> JobState | None:
    # Names that users choose come before, and may hold anything.
    found = re.search(r"\bJobState=(\w+) Reason=(\S*) Dependency=.*?\bRunTime=(\S+)(?:.*? NodeList=(\S*))?", out)
    return JobState(found[1], _word(found[2]), _word(found[4] or ""), found[3], "scontrol") if found else None


def _from_sacct(out: str) -> JobState | None:
    found = re.match(r"(\w+)(.*)\|(.*)\|(.*)", out)
    return JobState(found[1], found[2].strip(), _word(found[3]), found[4], "sacct") if found else None


def _word(text: str) -> str:
    return "" if text in ("None", "(null)", "None assigned", "N/A") else text


# Program, arguments, what reads the answer, and its most seconds: together what `state` promises.
_ASKED: tuple[tuple[str, tuple[str, ...], Callable[[str], JobState | None], float], ...] = (
    ("squeue", ("--noheader", "--states=all", "--jobs=JOB", "--format=%T|%r|%N|%M"), _from_squeue, 1.5),
    ("scontrol", ("show", "job", "--oneliner", "JOB"), _from_scontrol, 0.8),
    ("sacct", ("-n", "-X", "-P", "-j", "JOB", "-o", "State,NodeList,Elapsed"), _from_sacct, 1.2),
)
