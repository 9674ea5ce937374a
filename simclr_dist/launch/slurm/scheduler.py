"""Run SLURM's programs, each for a bounded time. They submit a job, tell its state, requeue it, cancel it."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from simclr_dist.system import signals
from simclr_dist.system.errors import ConfigError, reason_of
from simclr_dist.system.slurm_job import job_id, restart_count

JOB_NUMBER = re.compile(r"[0-9]+(_[0-9]+)?")
"""Of a job, or of an array's task."""
GONE, UNKNOWN = "GONE", "UNKNOWN"
_OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT", GONE,
}  # fmt: skip
_PATIENCE = 20.0  # seconds for one answer of a busy controller; its programs themselves try again after 10
# Answers that no second try changes. While a controller is away, its programs have many other words.
_REFUSALS = ("invalid job id", "disabled", "denied", "already completing or completed", "not permitted")


@dataclass(frozen=True)
class JobState:
    """The state of a job in SLURM's words. GONE: no part of SLURM knows the job any more. UNKNOWN: no part answers.

    `stale`: accounting alone has answered. Of a job that was just requeued it may tell the end before.
    """

    name: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    source: str = ""
    stale: bool = False

    @property
    def over(self) -> bool:
        """Tell whether the job has ended for good. Return False also where that is unknown."""
        return self.name in _OVER and not self.stale

    def __str__(self) -> str:
        parts = [self.name, f"({self.reason})" if self.reason else "", f"on {self.nodes}" if self.nodes else "", self.elapsed]
        return " ".join(part for part in parts if part) + (f", says {self.source}" if self.source else "")


@dataclass(frozen=True)
class Answer:
    """Exit code and output of a program."""

    code: int | None  # None: it did not end in time
    out: str
    complaints: tuple[str, ...]  # the lines of stderr without the program's name

    @property
    def complaint(self) -> str:
        """Return the last line of stderr, which names the reason."""
        return self.complaints[-1] if self.complaints else ""


def require(*programs: str) -> None:
    """Raise ConfigError when a program of SLURM is not on PATH."""
    for program in programs:
        if shutil.which(program) is None:
            raise ConfigError(f"SLURM is not here: no {program} on PATH; do this on a login node of the cluster")


def state(job_id: str, *, seconds: float = 3.5) -> JobState:
    """Ask squeue, then scontrol, then sacct, until one knows the job. Takes at most `seconds`."""
    deadline, forgotten, reasons = time.monotonic() + seconds, False, []
    for program, (arguments, _, share) in _QUESTIONS.items():
        command = [program, *(part.replace("JOB", job_id) for part in arguments)]
        answer = ask(command, min(share, deadline - time.monotonic()))
        if answer.code == 0 and (job := _read(program, answer.out)):
            return replace(job, stale=program == "sacct" and not forgotten)
        # The controller forgets jobs that ended some minutes ago; accounting, if there is any, remembers.
        forgotten = forgotten or "Invalid job id" in answer.complaint
        reasons.append(f"{program}: {answer.complaint or 'does not know it'}")
    return JobState(GONE, "no longer known") if forgotten else JobState(UNKNOWN, "; ".join(reasons))


def states(job_ids: Sequence[str]) -> list[JobState]:
    """Ask for the states of several jobs at once. Takes the time of one."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(state, job_ids))


def cluster() -> str | None:
    """Return the name of the cluster that answers here. Two may share a disk, and have jobs of one number."""
    if name := os.environ.get("SLURM_CLUSTER_NAME"):  # inside a job
        return name
    named = re.search(r"^ClusterName\s*= (\S+)", ask(["scontrol", "show", "config"], 3.0).out, re.MULTILINE)
    return named[1] if named else None


def overtaken(job_id: str, *, seconds: float = 10.0) -> Literal["cancelled", "requeued", "no"] | None:
    """Tell whether somebody else has ended this process's job. Return None when SLURM does not say."""
    answer = ask(["scontrol", "show", "job", job_id], seconds)
    job, restarts = _read("scontrol", answer.out), re.search(r"^ +Requeue=\d Restarts=(\d+) ", answer.out, re.MULTILINE)
    if job is None or restarts is None:
        return None
    if int(restarts[1]) > restart_count():
        return "requeued"
    # A cancelled job is COMPLETING until its last process is gone, and only at a time limit is there a reason.
    return "cancelled" if job.name in ("COMPLETING", "CANCELLED") and job.reason != "TimeLimit" else "no"


def requeue(job_id: str, *, seconds: float = 60.0) -> str | None:
    """Requeue this process's job. Return None when it is requeued, also by somebody else; otherwise why not.

    Tries for `seconds` while the controller does not answer. A cancelled job is left alone: SLURM would revive it. So nothing
    is asked before SLURM has said that it is not. It is asked all the same after `seconds` of silence: the processes of a
    cancelled job are killed after KillWait, mostly 30 s, also while the controller is away. Whoever is there then was hardly
    cancelled. And nobody sees that a stopped run is lost, but anybody sees in the queue, and cancels again, a job that is not.
    """
    if shutil.which("scontrol") is None:
        return "scontrol: is not on PATH"
    deadline = time.monotonic() + seconds
    while True:
        fate = overtaken(job_id, seconds=min(max(deadline - time.monotonic(), 1.0), _PATIENCE))
        if fate in ("cancelled", "requeued"):
            return None if fate == "requeued" else "the job was cancelled"
        over = time.monotonic() >= deadline
        if fate is not None or over:
            answer = ask(["scontrol", "requeue", job_id], max(deadline - time.monotonic(), _PATIENCE))
            if answer.code == 0 or "pending execution" in answer.complaint:
                return None
            if over or any(words in answer.complaint.lower() for words in _REFUSALS):
                return f"scontrol: {answer.complaint}"
        time.sleep(min(1.0, seconds / 10))


def cancel(job_ids: Sequence[str], *, seconds: float = 30.0) -> str | None:
    """Cancel jobs, ended ones among them. Return None when SLURM accepts that; otherwise why not."""
    answer = ask(["scancel", *job_ids], seconds)
    return None if answer.code == 0 else f"scancel: {answer.complaint}"


def submit(script: Path, *, seconds: float = 600.0) -> str:
    """Submit a batch script; return the job's number. Raises ConfigError when SLURM refuses it.

    Variables that would overrule the script are hidden from sbatch: SBATCH_*, and those of a job that submits jobs.
    """
    options = set(re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(encoding="utf-8"), re.MULTILINE))
    other_names = {"timelimit": "time", "mem-per-node": "mem", "no-requeue": "requeue", "array-inx": "array"}

    def visible(name: str) -> bool:
        option = name.removeprefix("SBATCH_").lower().replace("_", "-")
        overrules = name.startswith("SBATCH_") and other_names.get(option, option) in options
        inherited = job_id() is not None and name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name != "SLURM_CONF"
        return not overrules and not inherited

    environment = {name: value for name, value in os.environ.items() if visible(name)}
    answer = ask(["sbatch", str(script)], seconds, environment)  # a time-out leaves open whether there is a job
    number = re.search(r"job ([0-9]+)", answer.out)
    if answer.code != 0 or number is None:
        reason = "; ".join(answer.complaints) or f"sbatch names no job: {answer.out.strip()!r}"
        raise ConfigError(f"SLURM refused the job: {reason}")
    return number[1]


def ask(command: Sequence[str], seconds: float, environment: Mapping[str, str] = os.environ) -> Answer:
    """Run a program for at most `seconds`. Then kill it with all that it has started.

    Stop signals do not reach it: those that a requeue sends to every process of the job would end the request for it.
    """
    # The user's habits for these programs' tables would change what they answer.
    variables = {key: value for key, value in environment.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    if seconds <= 0:
        return Answer(None, "", ("not asked, no time was left",))
    try:
        with signals.blocked():
            program = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, errors="replace", start_new_session=True, env=variables,
            )  # fmt: skip
    except OSError as error:
        return Answer(127, "", (reason_of(error),))
    with program:
        try:
            out, err = program.communicate(timeout=seconds)
        except BaseException as error:  # also Ctrl-C, which the program does not hear
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Answer(None, "", (f"no answer in {seconds:.1f} s",))
    lines = err.strip().splitlines() or [f"ended with {program.returncode}"] * bool(program.returncode)
    return Answer(program.returncode, out, tuple(re.sub(r"^\w+: (error|fatal): ", "", line) for line in lines))


def _read(program: str, out: str) -> JobState | None:
    """Read the state of a job from what a program prints."""
    if (match := re.search(_QUESTIONS[program][1], out.strip())) is None:
        return None
    nothing = ("None", "(null)", "None assigned", "N/A")
    said: dict[str, Any] = {key: "" if text in nothing else text for key, text in match.groupdict("").items()}
    return JobState(**said, source=program)


# Arguments of each program, its answer, and most seconds: together those of `state`, less 0.2 to start the programs.
_QUESTIONS = {
    "squeue": (
        ("--noheader", "--states=all", "--jobs=JOB", "--format=%T|%r|%N|%M"),
        r"\A(?P<name>\w+)\|(?P<reason>.*)\|(?P<nodes>.*)\|(?P<elapsed>.*)\Z", 1.5,
    ),
    "scontrol": (  # not --oneliner: names that users choose come before, may hold anything, but begin no line
        ("show", "job", "JOB"),
        r"(?ms)^ +JobState=(?P<name>\w+) Reason=(?P<reason>\S*) .*?"
        r"^ +RunTime=(?P<elapsed>\S+)(?:.*?^ +NodeList=(?P<nodes>\S*))?", 0.8,
    ),
    "sacct": (
        ("-n", "-X", "-P", "-j", "JOB", "-o", "State,NodeList,Elapsed"),
        r"\A(?P<name>\w+) ?(?P<reason>.*)\|(?P<nodes>.*)\|(?P<elapsed>.*)", 1.0,
    ),
}  # fmt: skip
