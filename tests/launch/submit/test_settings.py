"""SLURM settings that would lose work, as a stand-in's scontrol shows them."""

import pytest

from simclr_dist.launch.slurm import settings
from stand_ins import StandIns

SCONTROL = """#!/bin/sh
case "$2" in
config) printf '%s' '{config}';;
partition) echo '{partition}';;
job) echo '{job}';;
esac
"""
CONFIG = """Configuration data as of 2026-01-01
JobRequeue              = 1
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_CONF              = /etc/slurm.conf
"""
PARTITION = "PartitionName=main AllowGroups=ALL Default=YES GraceTime=300 MaxTime=UNLIMITED PreemptMode=REQUEUE State=UP"


def shown(slurm: StandIns, **changes: str) -> list[tuple[bool, str]]:
    """(fatal, found) for a checkpoint of 20 s."""
    text = {"config": CONFIG, "partition": PARTITION, "job": ""} | changes
    path = slurm.bin / "scontrol"
    path.write_text(SCONTROL.format(**text))
    path.chmod(0o755)
    return [(danger.fatal, danger.problem) for danger in settings.dangers(20.0)[1]]


def test_nothing_to_fear(no_slurm: StandIns) -> None:
    assert settings.dangers(20.0) == ("", []), "no SLURM"
    assert shown(no_slurm) == []
    assert settings.dangers(20.0)[0] == "partition main"
    assert shown(no_slurm, partition=PARTITION.replace("300", "UNLIMITED")) == []
    none = CONFIG.replace("preempt/partition_prio", "preempt/none")
    assert shown(no_slurm, config=none, partition=PARTITION.replace("300", "0")) == []


def test_a_grace_that_is_too_short(no_slurm: StandIns) -> None:
    [(fatal, found)] = shown(no_slurm, partition=PARTITION.replace("300", "10"))
    assert fatal
    assert found == "GraceTime=10 is too short for a step and a checkpoint (25 s): a preemption loses work"


QOS = CONFIG.replace("preempt/partition_prio", "preempt/qos")
JOB = "JobId=7 JobName=a Account=us QOS=low Requeue=1 Restarts=0"


def test_where_the_qos_rules_its_grace_counts(no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its PreemptMode: the partition's, which the test has at 300 s and 10 s, do not."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for answer, expected in (
        ("00:05:00|cluster", []),
        ("1-00:00:00|requeue", []),
        ("00:00:10|requeue", ["GraceTime=10 is too short for a step and a checkpoint (25 s): a preemption loses work"]),
        ("00:01:00|cancel", ["PreemptMode=CANCEL: a preempted job does not start again"]),
    ):
        no_slurm.write("sacctmgr", f"#!/bin/sh\necho \"$@\" > {no_slurm.folder}/asked\necho '{answer}'\n")
        for partition in (PARTITION, PARTITION.replace("300", "10").replace("REQUEUE", "OFF")):
            found = shown(no_slurm, config=QOS, partition=partition, job=JOB)
            assert found == [(True, problem) for problem in expected]
    assert settings.dangers(20.0)[0] == "partition main, QOS low"
    assert (no_slurm.folder / "asked").read_text().split()[-3:] == ["qos", "low", "format=GraceTime,PreemptMode"]


@pytest.mark.parametrize(
    ("job", "sacctmgr", "why"),
    [
        ("", "echo '00:05:00|cluster'", "this is no job"),
        (JOB, "echo 'sacctmgr: error: Connection refused' >&2; exit 1", "Connection refused"),
        (JOB, "true", "sacctmgr does not know 'low'"),
    ],
)
def test_a_qos_that_is_not_known(
    no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch, job: str, sacctmgr: str, why: str
) -> None:
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    no_slurm.write("sacctmgr", f"#!/bin/sh\n{sacctmgr}\n")
    [(fatal, found)] = shown(no_slurm, config=QOS, job=job)
    assert not fatal
    assert found == f"PreemptType=preempt/qos: GraceTime and PreemptMode are the QOS's, and not known here: {why}"


def test_preemption_without_a_requeue(no_slurm: StandIns) -> None:
    [(fatal, found)] = shown(no_slurm, partition=PARTITION.replace("REQUEUE", "CANCEL"))
    assert fatal
    assert found.startswith("PreemptMode=CANCEL")
    [(fatal, found)] = shown(no_slurm, partition=PARTITION.replace("REQUEUE", "SUSPEND"))
    assert not fatal
    assert found.startswith("PreemptMode=SUSPEND")


def test_requeue_off(no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    off = CONFIG.replace("JobRequeue              = 1", "JobRequeue              = 0")
    [(fatal, found)] = shown(no_slurm, config=off)
    assert not fatal, "for what `submit` sends asks for it"
    assert found.startswith("JobRequeue=0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert shown(no_slurm, config=off, job="JobId=7 JobName=a Requeue=1 Restarts=0") == []
    [(fatal, found)] = shown(no_slurm, job="JobId=7 JobName=a Requeue=0 Restarts=0")
    assert fatal
    assert "Requeue=0" in found


def test_a_controller_that_is_away(no_slurm: StandIns) -> None:
    no_slurm.write("scontrol", "#!/bin/sh\necho 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2\nexit 1\n")
    [danger] = settings.dangers(20.0)[1]
    assert not danger.fatal
    assert "Unable to contact slurm controller" in danger.problem
