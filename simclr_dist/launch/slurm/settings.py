"""Find SLURM settings under which a training would lose work."""

import os
import re
import shutil
from dataclasses import dataclass

from simclr_dist.launch.slurm import scheduler
from simclr_dist.system.slurm_job import job_id

_SECONDS = 5.0  # for an answer of scontrol
_ENOUGH_SECONDS = 5.0  # beside the checkpoint: for the step that is under way


@dataclass(frozen=True)
class Danger:
    """A setting that loses work, and what to do about it."""

    problem: str
    cure: str
    fatal: bool  # every such stop loses work


def dangers(checkpoint_seconds: float) -> tuple[str, list[Danger]]:
    """Check this job's partition, or the default one. Return its name and the dangers, ("", []) without SLURM."""
    if shutil.which("scontrol") is None:
        return "", []
    cluster, complaint = _show("config")
    if not cluster:
        cure = "ask again where SLURM's controller can be reached"
        return "SLURM", [Danger(f"scontrol does not answer: {complaint}", cure, False)]
    name = os.environ.get("SLURM_JOB_PARTITION")
    answer = scheduler.ask(["scontrol", "show", "partition", "--oneliner", *([name] if name else [])], _SECONDS)
    partitions = [_fields(line) for line in answer.out.splitlines() if line.strip()] or [{}]
    partition = next((each for each in partitions if name or each.get("Default") == "YES"), partitions[0])
    job, _ = _show("job", number) if (number := job_id()) else ({}, "")
    title = f"partition {partition.get('PartitionName', name or 'of the cluster')}"
    problems = _preemption(cluster, partition, checkpoint_seconds)
    cure = "submit with --requeue, as `simclr-dist submit` and launch/train.sbatch do"
    if job.get("Requeue") == "0":
        problems.insert(0, Danger("this job is not requeued (Requeue=0): a lost node or a preemption ends it", cure, True))
    elif not job and cluster.get("JobRequeue") == "0":
        problems.insert(0, Danger("JobRequeue=0: jobs without --requeue end with a lost node or a preemption", cure, False))
    return title, problems


def _preemption(cluster: dict[str, str], partition: dict[str, str], checkpoint_seconds: float) -> list[Danger]:
    if cluster.get("PreemptType", "preempt/none").endswith("none"):
        return []
    modes = set((partition.get("PreemptMode") or cluster.get("PreemptMode", "OFF")).upper().split(","))
    problems = []
    if "CANCEL" in modes:
        cure = "a partition with PreemptMode=REQUEUE; here `simclr-dist submit resume RUN` goes on, by hand"
        problems.append(Danger("PreemptMode=CANCEL: a preempted job does not start again", cure, True))
    elif "SUSPEND" in modes:
        cure = "a partition with PreemptMode=REQUEUE, and a long timeout_minutes here"
        lost = "PreemptMode=SUSPEND: a stopped job's peers on other nodes run into their time-out"
        problems.append(Danger(lost, cure, False))
    elif "REQUEUE" not in modes:
        return []
    seconds, needed = re.match(r"[0-9]+", partition.get("GraceTime", "0")), checkpoint_seconds + _ENOUGH_SECONDS
    if seconds and (grace := float(seconds[0])) < needed:  # else it is UNLIMITED
        cure = f"ask for GraceTime={needed:.0f} or more, or set checkpoint.every so low that what is lost does not matter"
        lost = f"GraceTime={grace:g} is too short for a step and a checkpoint ({needed:.0f} s): a preemption loses work"
        problems.append(Danger(lost, cure, True))
    return problems


def _show(*what: str) -> tuple[dict[str, str], str]:
    """Return what `scontrol show` prints, {} when it fails; and its complaint."""
    answer = scheduler.ask(["scontrol", "show", *what], _SECONDS)
    return (_fields(answer.out) if answer.code == 0 else {}), answer.complaint


def _fields(text: str) -> dict[str, str]:
    """Read `Key=value` and, of the configuration, `Key    = value`."""
    return dict(re.findall(r"(?:^|\s)(\w+)\s*=[ \t]*(\S*)", text))
