"""`srun simclr-dist check` over all nodes of a real SLURM."""

from pathlib import Path

import pytest

import training_runs
from slurm.cluster import Cluster

SRUN = ("srun", "--nodes=2", "--ntasks-per-node=1", "simclr-dist", "check", "config.yaml")


@pytest.mark.parametrize("cluster", [{"grace": 2}], indirect=True)
def test_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """All is well, but for a grace in which no checkpoint can be saved."""
    training_runs.write_config(tmp_path, training_runs.make_shards(tmp_path), run_folder=str(tmp_path / "run"))
    done = cluster.login(*SRUN, env={"OMP_NUM_THREADS": "1"}, cwd=tmp_path, timeout=240, check=False)
    assert done.stdout, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert lines[-1] == "11 checks: 1 failed, 0 with a warning", done.stdout + done.stderr
    assert "names of 2 machines: n1, n2" in done.stdout
    assert "the distributed gradient is one process's" in done.stdout
    assert "GraceTime=2 is too short" in done.stdout
    assert done.returncode == 1
    assert not list(tmp_path.glob("**/.check-*"))


@pytest.mark.parametrize("cluster", [{"nodes": 3}], indirect=True)
def test_a_step_of_fewer_nodes_than_its_job(cluster: Cluster, tmp_path: Path) -> None:
    """Rank 0 is on the step's first node, which is not the job's. And the job has more nodes than the step has tasks."""
    step = "srun --nodes=1 --nodelist=n2 --ntasks=2 simclr-dist check --only network"
    job = cluster.sbatch(step, "--nodes=3", "--ntasks-per-node=2", "--output=said", cwd=tmp_path)
    assert cluster.wait(job, "COMPLETED", "FAILED", seconds=90) == "COMPLETED", (tmp_path / "said").read_text()
    assert "ports: each of 2 ranks reaches the next" in (tmp_path / "said").read_text()
