"""Find SLURM settings under which a training would lose work."""

import math
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
    """Check this job's partition or QOS, or the default partition. Return its name and the dangers, ("", []) without SLURM."""
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
    if cluster.get("PreemptType") == "preempt/qos":
        title += f", QOS {job.get('QOS')}" if job else ""
        problems = _preemption_by_qos(cluster, job.get("QOS"), checkpoint_seconds)
    else:
        problems = _preemption(cluster, partition, checkpoint_seconds)
    cure = "submit with --requeue, as `simclr-dist submit` and launch/train.sbatch do"
    if job.get("Requeue") == "0":
        problems.insert(0, Danger("this job is not requeued (Requeue=0): a lost node or a preemption ends it", cure, True))
    elif not job and cluster.get("JobRequeue") == "0":
        problems.insert(0, Danger("JobRequeue=0: jobs without --requeue end with a lost node or a preemption", cure, False))
    return title, problems


def _preemption_by_qos(cluster: dict[str, str], qos: str | None, checkpoint_seconds: float) -> list[Danger]:
    """Find what the job's QOS says, where that rules. Only a job has one, and only accounting knows what it says."""
    command = ["sacctmgr", "--noheader", "--parsable2", "show", "qos", str(qos), "format=GraceTime,PreemptMode"]
    answer = scheduler.ask(command, _SECONDS) if qos else scheduler.Answer(1, "", ("this is no job",))
    grace, _, mode = answer.out.strip().partition("|")
    if answer.code != 0 or not mode:
        why = answer.complaint or f"sacctmgr does not know {qos!r}"
        lost = f"PreemptType=preempt/qos: GraceTime and PreemptMode are the QOS's, and not known here: {why}"
        cure = "ask in a job, or look at `sacctmgr show qos format=name,gracetime,preemptmode`"
        return [Danger(lost, cure, False)]
    return _preemption(cluster, {"GraceTime": grace, "PreemptMode": "" if mode == "cluster" else mode}, checkpoint_seconds)


def _preemption(cluster: dict[str, str], rules: dict[str, str], checkpoint_seconds: float) -> list[Danger]:
    """Find dangers in the `rules` of a partition or a QOS. What they do not say is the cluster's."""
    if cluster.get("PreemptType", "preempt/none").endswith("none"):
        return []
    modes = set((rules.get("PreemptMode") or cluster.get("PreemptMode", "OFF")).upper().split(","))
    problems = []
    if "CANCEL" in modes:
        cure = "a partition or QOS with PreemptMode=REQUEUE; here `simclr-dist submit resume RUN` goes on, by hand"
        problems.append(Danger("PreemptMode=CANCEL: a preempted job does not start again", cure, True))
    elif "SUSPEND" in modes:
        cure = "a partition or QOS with PreemptMode=REQUEUE, and a long timeout_minutes here"
        lost = "PreemptMode=SUSPEND: a stopped job's peers on other nodes run into their time-out"
        problems.append(Danger(lost, cure, False))
    elif "REQUEUE" not in modes:
        return []
    needed = checkpoint_seconds + _ENOUGH_SECONDS
    if (grace := _seconds(rules.get("GraceTime", "0"))) < needed:
        cure = f"ask for GraceTime={needed:.0f} or more, or set checkpoint.every so low that what is lost does not matter"
        lost = f"GraceTime={grace:g} is too short for a step and a checkpoint ({needed:.0f} s): a preemption loses work"
        problems.append(Danger(lost, cure, True))
    return problems


def _seconds(text: str) -> float:
    """Read a partition's seconds, or a QOS's [days-]hours:minutes:seconds."""
    if not (parts := re.findall(r"[0-9]+", text)):
        return math.inf  # UNLIMITED
    return sum(int(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86_400), strict=False))


def _show(*what: str) -> tuple[dict[str, str], str]:
    """Return what `scontrol show` prints, {} when it fails; and its complaint."""
    answer = scheduler.ask(["scontrol", "show", *what], _SECONDS)
    return (_fields(answer.out) if answer.code == 0 else {}), answer.complaint


def _fields(text: str) -> dict[str, str]:
    """Read `Key=value` and, of the configuration, `Key    = value`."""
    return dict(re.findall(r"(?:^|\s)(\w+)\s*=[ \t]*(\S*)", text))
