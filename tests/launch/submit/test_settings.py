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
