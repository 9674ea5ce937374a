"""SLURM's programs as small scripts that answer, refuse, hang or are not there."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from simclr_dist.launch.slurm import scheduler
from simclr_dist.launch.slurm.scheduler import GONE, UNKNOWN, JobState
from simclr_dist.system.errors import ConfigError
from stand_ins import StandIns

# As SLURM 22.05 writes it, with a name and a comment that look like its own words.
OWN = "JobState=CANCELLED Reason=None Dependency=(null) Requeue=1 Restarts=9 BatchFlag=1 RunTime=09:09 NodeList=n9 "
SHOWN = f"""\
JobId=7 JobName=a {OWN}
   UserId=me(1) GroupId=me(1) MCS_label=N/A
   Priority=1 Nice=0 Account=(null) QOS=(null)
   JobState={{state}} Reason={{reason}} Dependency=(null)
   Requeue=1 Restarts={{restarts}} BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:01:05 TimeLimit=1-00:00:00 TimeMin=N/A
   Partition=main AllocNode:Sid=login:0
   ReqNodeList=(null) ExcNodeList=n9
   NodeList={{nodes}}
   BatchHost=n1
   Comment={OWN}
"""
HANGS = "#!/bin/sh\n/bin/sleep 30\n"
FORGOTTEN = "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
AWAY = "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n"


def says(text: str) -> str:
    return f"#!/bin/sh\n/bin/cat <<'END'\n{text.rstrip()}\nEND\n".replace("{", "{{").replace("}", "}}")


def shown(state: str, *, reason: str = "None", restarts: int = 0, nodes: str = "n[1-2]") -> str:
    return says(SHOWN.format(state=state, reason=reason, restarts=restarts, nodes=nodes))


def test_squeue_is_asked_first(no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    no_slurm.write("squeue", '#!/bin/sh\necho "$@" "$SQUEUE_STATES" > {folder}/asked\necho "RUNNING|None|n[1-2]|1-02:03:04"\n')
    no_slurm.write("scontrol", HANGS)
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")  # a user's habit must not hide the job
    found = scheduler.state("7")
    assert found == JobState("RUNNING", "", "n[1-2]", "1-02:03:04", "squeue")
    assert str(found) == "RUNNING on n[1-2] 1-02:03:04, says squeue"
    assert not found.over
    asked = (no_slurm.folder / "asked").read_text()
    assert "--jobs=7 " in asked
    assert "PENDING" not in asked


def test_then_scontrol(no_slurm: StandIns) -> None:
    no_slurm.write("squeue", HANGS)
    no_slurm.write("scontrol", shown("PENDING", reason="Dependency", nodes="(null)"))
    began = time.monotonic()
    assert scheduler.state("7") == JobState("PENDING", "Dependency", "", "00:01:05", "scontrol")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("COMPLETED|n1|00:01:00", JobState("COMPLETED", "", "n1", "00:01:00", "sacct")),
        ("CANCELLED by 1000|None assigned|00:00:00", JobState("CANCELLED", "by 1000", "", "00:00:00", "sacct")),
    ],
)
def test_then_sacct_which_remembers(no_slurm: StandIns, line: str, expected: JobState) -> None:
    no_slurm.write("squeue", FORGOTTEN)
    no_slurm.write("scontrol", FORGOTTEN)
    no_slurm.write("sacct", says(line))
    assert scheduler.state("7") == expected
    assert scheduler.state("7").over


@pytest.mark.parametrize("sacct", [None, HANGS, "#!/bin/sh\nexit 0\n", AWAY])
def test_a_job_that_nobody_remembers_is_gone(no_slurm: StandIns, sacct: str | None) -> None:
    no_slurm.write("squeue", FORGOTTEN)
    if sacct is not None:
        no_slurm.write("sacct", sacct)
    assert scheduler.state("7").name == GONE
    assert scheduler.state("7").over


@pytest.mark.parametrize("program", [AWAY, HANGS, None, "#!/bin/sh\nexit 0\n"])
def test_when_nobody_answers_the_state_is_unknown_soon(no_slurm: StandIns, program: str | None) -> None:
    if program is not None:
        for name in ("squeue", "scontrol", "sacct"):
            no_slurm.write(name, program)
    began = time.monotonic()
    first, second = scheduler.states(["7", "8"])
    assert time.monotonic() - began < 20, "each is given seconds, not the minutes that it would take"
    assert first == second
    assert first.name == UNKNOWN
    assert not first.over
    for name in ("squeue", "scontrol", "sacct"):
        assert f"{name}: " in first.reason


def test_what_hangs_is_ended_with_its_children(no_slurm: StandIns) -> None:
    no_slurm.write("scancel", "#!/bin/sh\n/bin/sleep 60 &\necho $! > {folder}/child\nwait\n")
    refused = scheduler.cancel(["7"], seconds=0.5)
    assert refused == "scancel: no answer in 0.5 s"
    child = Path(f"/proc/{(no_slurm.folder / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_cancel(no_slurm: StandIns) -> None:
    no_slurm.write("scancel", '#!/bin/sh\necho "$@" > {folder}/asked\n')
    assert scheduler.cancel(["7", "8"]) is None
    assert (no_slurm.folder / "asked").read_text() == "7 8\n"
    no_slurm.write(
        "scancel", "#!/bin/sh\necho 'scancel: error: Kill job error on job id 7: Access/permission denied' >&2\nexit 1"
    )
    assert scheduler.cancel(["7"]) == "scancel: Kill job error on job id 7: Access/permission denied"


# scontrol: `show` says that the job runs, or what is in {folder}/shown; `requeue` counts, and does what the test says with the
# count in $n.
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then
[ -f {folder}/shown ] && exec /bin/cat {folder}/shown
echo "JobId=7 JobName=a
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:01:05 TimeLimit=1-00:00:00"
exit
fi
n=$(/bin/cat {folder}/requeues 2>/dev/null || echo 0); n=$((n + 1)); echo $n > {folder}/requeues
"""


def requeues(slurm: StandIns) -> int:
    path = slurm.folder / "requeues"
    return int(path.read_text()) if path.exists() else 0


def test_requeue_is_accepted(no_slurm: StandIns) -> None:
    no_slurm.write("scontrol", SCONTROL)
    assert scheduler.requeue("7") is None
    assert requeues(no_slurm) == 1


def test_requeue_waits_for_a_controller_that_is_away(no_slurm: StandIns) -> None:
    away = "if [ $n -lt 3 ]; then echo 'Unexpected message received for job 7' >&2; exit 1; fi\n"
    no_slurm.write("scontrol", SCONTROL + away)
    assert scheduler.requeue("7", seconds=8) is None
    assert requeues(no_slurm) == 3


def test_requeue_gives_up_in_time(no_slurm: StandIns) -> None:
    no_slurm.write("scontrol", SCONTROL + "echo 'Unable to contact slurm controller' >&2; exit 1\n")
    assert scheduler.requeue("7", seconds=1) == "scontrol: Unable to contact slurm controller"
    assert 2 <= requeues(no_slurm) <= 12


@pytest.mark.parametrize(
    "words", ["Invalid job id specified", "Requested operation is presently disabled", "Access/permission denied"]
)
def test_a_refusal_is_final(no_slurm: StandIns, words: str) -> None:
    no_slurm.write("scontrol", SCONTROL + f"echo '{words} for job 7' >&2; exit 1\n")
    assert scheduler.requeue("7", seconds=2) == f"scontrol: {words} for job 7"
    assert requeues(no_slurm) == 1


def test_requeued_by_somebody_else_is_as_good(no_slurm: StandIns) -> None:
    no_slurm.write("scontrol", SCONTROL + "echo 'Job is pending execution for job 7' >&2; exit 1\n")
    assert scheduler.requeue("7", seconds=2) is None


def test_without_scontrol_as_in_a_container(no_slurm: StandIns) -> None:
    assert scheduler.requeue("7") == "scontrol: is not on PATH"


@pytest.mark.parametrize(
    ("state", "reason", "restarts", "own", "fate"),
    [
        ("RUNNING", "None", 0, 0, "no"),
        ("COMPLETING", "None", 0, 0, "cancelled"),
        ("CANCELLED", "None", 2, 2, "cancelled"),
        ("COMPLETING", "TimeLimit", 1, 1, "no"),
        ("COMPLETING", "None", 1, 0, "requeued"),
        ("PENDING", "BeginTime", 3, 2, "requeued"),
    ],
)
def test_who_has_ended_the_job(
    no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch, state: str, reason: str, restarts: int, own: int, fate: str
) -> None:
    if own:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(own))
    no_slurm.write("scontrol", SCONTROL)
    (no_slurm.folder / "shown").write_text(SHOWN.format(state=state, reason=reason, restarts=restarts, nodes="n1"))
    assert scheduler.overtaken("7") == fate
    assert scheduler.requeue("7") == ("the job was cancelled" if fate == "cancelled" else None)
    assert requeues(no_slurm) == (fate == "no")  # SLURM would revive a cancelled job


@pytest.mark.parametrize(
    "first", ["/bin/sleep 9", "echo 'Unable to contact slurm controller' >&2; exit 1", "echo no answer; exit"]
)
def test_nothing_is_requeued_before_slurm_has_said_that_it_is_not_cancelled(
    no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """It may be late, or away for a while."""
    monkeypatch.setattr(scheduler, "_PATIENCE", 1.0)
    once = f"[ -f {{folder}}/asked ] || {{{{ : > {{folder}}/asked; {first}; }}}}\n"
    no_slurm.write("scontrol", SCONTROL.replace("then\n", f"then\n{once}", 1))
    (no_slurm.folder / "shown").write_text(SHOWN.format(state="COMPLETING", reason="None", restarts=0, nodes="n1"))
    assert scheduler.requeue("7", seconds=30) == "the job was cancelled"
    assert requeues(no_slurm) == 0
    (no_slurm.folder / "asked").unlink()
    (no_slurm.folder / "shown").unlink()
    assert scheduler.requeue("7", seconds=30) is None


def test_after_a_long_silence_a_job_that_still_lives_was_not_cancelled(
    no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_PATIENCE", 1.0)
    no_slurm.write("scontrol", SCONTROL.replace("then\n", "then\nexit 1\n", 1))
    assert scheduler.requeue("7", seconds=1) is None
    assert requeues(no_slurm) == 1


def test_signals_to_the_job_do_not_end_the_request(no_slurm: StandIns) -> None:
    """A requeue has SIGTERM sent to every process of the job, also to the scontrol that asks for it."""
    program = f"""#!{sys.executable}
import os, pathlib, signal
for number in (signal.SIGTERM, signal.SIGUSR2):
    os.kill(os.getpid(), number)
pathlib.Path("{no_slurm.folder}/end").touch()
"""  # no shell: dash takes up signals that its parent has blocked
    no_slurm.write("scontrol", program)
    assert scheduler.requeue("7", seconds=1) is None
    assert (no_slurm.folder / "end").exists()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()  # ours are open again


def test_a_signal_meanwhile_reaches_this_process(no_slurm: StandIns) -> None:
    no_slurm.write("scontrol", SCONTROL + "/bin/sleep 0.5\n")
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert scheduler.requeue("7") is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_no_slurm_is_one_line(no_slurm: StandIns) -> None:
    with pytest.raises(ConfigError, match=r"^SLURM is not here: no squeue on PATH; do this on a login node of the cluster$"):
        scheduler.require("squeue")


def test_ctrl_c_ends_what_was_asked(no_slurm: StandIns) -> None:
    """The program has a session of its own, and does not hear the terminal: an sbatch left alone might still make a job."""
    no_slurm.write(
        "scancel", "#!/bin/sh\necho $$ > {folder}/pid.new; /bin/mv {folder}/pid.new {folder}/pid\nexec /bin/sleep 60\n"
    )

    def interrupt() -> None:
        while not (no_slurm.folder / "pid").exists():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        scheduler.cancel(["7"])
    assert not Path(f"/proc/{(no_slurm.folder / 'pid').read_text().strip()}").exists()


def test_accounting_alone_does_not_end_a_job(no_slurm: StandIns) -> None:
    """Its last line of a job that was requeued a moment ago may say how the start before has ended."""
    for name in ("squeue", "scontrol"):
        no_slurm.write(name, AWAY)
    no_slurm.write("sacct", says("PREEMPTED|n1|00:10:00"))
    found = scheduler.state("7")
    assert str(found) == "PREEMPTED on n1 00:10:00, says sacct"
    assert not found.over


def test_which_cluster_is_asked(no_slurm: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scheduler.cluster() == "main", "a job knows"
    monkeypatch.delenv("SLURM_CLUSTER_NAME")
    assert scheduler.cluster() is None
    no_slurm.write("scontrol", says("SlurmctldHost[0]        = main1\nClusterName             = main\nSLURM_CONF = /a"))
    assert scheduler.cluster() == "main"
