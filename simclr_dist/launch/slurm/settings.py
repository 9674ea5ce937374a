"""SLURM settings under which a training would lose work: what `scontrol` shows of cluster, partition and job."""

import os
import re
import shutil
from dataclasses import dataclass

from simclr_dist.launch.slurm import scheduler

_SECONDS = 5.0  # for an answer of scontrol
_ENOUGH_SECONDS = 5.0  # beside the checkpoint: for the step that is under way


@dataclass(frozen=True)
class Danger:
    """What would be lost and when, and what to do; `fatal` if every such stop loses work."""

    found: str
    cure: str
    fatal: bool


def dangers(checkpoint_seconds: float) -> tuple[str, list[Danger]]:
    """(what was looked at, dangers) of this job's partition, or of the default one; nothing was looked at without SLURM."""
    if shutil.which("scontrol") is None:
        return "", []
    cluster, said = _shown("config")
    if not cluster:
        return "SLURM", [
            Danger(f"scontrol does not answer: {said}", "ask again where SLURM's controller can be reached", False)
        ]
    name = os.environ.get("SLURM_JOB_PARTITION")
    partition = _partition(name)
    job, _ = _shown("job", os.environ["SLURM_JOB_ID"]) if "SLURM_JOB_ID" in os.environ else ({}, "")
    looked = f"partition {partition.get('PartitionName', name or 'of the cluster')}"
    return looked, [*_requeue(cluster, job), *_preemption(cluster, partition, checkpoint_seconds)]


def _requeue(cluster: dict[str, str], job: dict[str, str]) -> list[Danger]:
    if job.get("Requeue") == "0":
        cure = "submit with --requeue, as `simclr-dist submit` and launch/train.sbatch do"
        return [Danger("this job is not requeued (Requeue=0): a lost node or a preemption ends it", cure, True)]
    if not job and cluster.get("JobRequeue") == "0":
        cure = "submit with --requeue, as `simclr-dist submit` and launch/train.sbatch do"
        return [Danger("JobRequeue=0: jobs without --requeue end with a lost node or a preemption", cure, False)]
    return []


def _preemption(cluster: dict[str, str], partition: dict[str, str], checkpoint_seconds: float) -> list[Danger]:
    if cluster.get("PreemptType", "preempt/none").endswith("none"):
        return []
    modes = set((partition.get("PreemptMode") or cluster.get("PreemptMode", "OFF")).upper().split(","))
    if modes & {"CANCEL"}:
        cure = "a partition with PreemptMode=REQUEUE; here `simclr-dist submit resume RUN` goes on, by hand"
        found = [Danger("PreemptMode=CANCEL: a preempted job does not start again", cure, True)]
    elif modes & {"SUSPEND"}:
        cure = "a partition with PreemptMode=REQUEUE, and a long timeout_minutes here"
        found = [Danger("PreemptMode=SUSPEND: a stopped job's peers on other nodes run into their time-out", cure, False)]
    elif "REQUEUE" in modes:
        found = []
    else:
        return []
    grace, needed = _number(partition.get("GraceTime", "0")), checkpoint_seconds + _ENOUGH_SECONDS
    if grace < needed:
        cure = f"ask for GraceTime={needed:.0f} or more, or set checkpoint.every so low that what is lost does not matter"
        lost = f"GraceTime={grace:g} is too short for a step and a checkpoint ({needed:.0f} s): a preemption loses work"
        found.append(Danger(lost, cure, True))
    return found


def _partition(name: str | None) -> dict[str, str]:
    answer = scheduler.ask(["scontrol", "show", "partition", "--oneliner", *([name] if name else [])], _SECONDS)
    shown = [_fields(line) for line in answer.out.splitlines() if line.strip()]
    return next((fields for fields in shown if name or fields.get("Default") == "YES"), shown[0] if shown else {})


def _shown(*what: str) -> tuple[dict[str, str], str]:
    answer = scheduler.ask(["scontrol", "show", *what], _SECONDS)
    return (_fields(answer.out) if answer.code == 0 else {}), answer.said


def _fields(text: str) -> dict[str, str]:
    """`Key=value` and, of the configuration, `Key    = value`."""
    return dict(re.findall(r"(?:^|\s)(\w+)\s*=[ \t]*(\S*)", text))


def _number(text: str) -> float:
    found = re.match(r"[0-9]+", text)
    return float(found[0]) if found else float("inf")  # UNLIMITED
