"""The batch scripts of launch/ under stand-ins for SLURM's programs; tests/slurm runs them on a real one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from simclr_dist.cli.main import main
from simclr_dist.run.status import read_ledger
from stand_ins import StandIns

LAUNCH = Path(__file__).parents[3] / "launch"
RUNS = {"train": ("config.yaml", "run"), "eval": ("run", "train", "test")}

SRUN = """#!/bin/sh
echo "$@" >> {folder}/srun
exit 75
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") echo n1;;
show*) printf "JobId=7\n   JobState=RUNNING Reason=None x\n   Requeue=1 Restarts=0 x\n   RunTime=00:00:07 x\n";;
*) echo "$@" >> {folder}/asked;;
esac
"""


@pytest.mark.parametrize("name", RUNS)
def test_no_python_need_stand_beside_the_program(no_slurm: StandIns, tmp_path: Path, name: str) -> None:
    """As after `pip install --user` or pipx; what was stopped is requeued all the same. CPUs are passed on if asked for."""
    no_slurm.write("srun", SRUN)
    no_slurm.write("scontrol", SCONTROL)
    (no_slurm.bin / "simclr-dist").symlink_to(Path(sys.executable).with_name("simclr-dist"))
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n1"}
    environment = {**os.environ, **job, "PATH": f"{no_slurm.bin}:/usr/bin:/bin"}
    for more, options in (({}, "simclr-dist"), ({"SLURM_CPUS_PER_TASK": "12"}, "--cpus-per-task=12 simclr-dist")):
        done = subprocess.run(
            ["bash", str(LAUNCH / f"{name}.sbatch"), *RUNS[name]],
            env=environment | more, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (75, "simclr-dist: job 7: starts again: stopped\n")
        assert (no_slurm.folder / "srun").read_text().splitlines()[-1].startswith(f"{options} {name} ")
    assert (no_slurm.folder / "asked").read_text() == 2 * "requeue 7\n"
    assert [entry["kind"] for entry in read_ledger(tmp_path / "run") if entry["event"] == "requeued"] == [name]


def test_what_a_batch_script_types_is_refused_elsewhere(no_slurm: StandIns, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescue", "run", "0"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["rescue", "run", "75"])
    assert "SLURM_JOB_ID is not set: this is for a batch script" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sbatch")), ids=lambda path: path.name)
def test_what_the_scripts_tell_to_type(path: Path) -> None:
    """Without --cpus-per-task a node's ranks share one CPU; and a job whose dependency has failed would wait for ever."""
    text = path.read_text()
    typed = re.findall(r"^#.*sbatch (.*launch/\w+\.sbatch)", text, re.MULTILINE)
    assert typed
    for line in typed:
        assert "--cpus-per-task=" in line, line
    assert ("afterok" in text) == ("#SBATCH --kill-on-invalid-dep=yes\n" in text)
