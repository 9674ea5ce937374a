"""Which SLURM job this is, by the variables that a real SLURM sets (tests/slurm tries them)."""

import pytest

from simclr_dist.system.slurm_job import ARRAY_TASK, job_id, restart_count


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"JOB_ID": "7"}, "7"),
        ({"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}, "7_3"),  # 7 alone is the whole array
        ({"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "0"}, "7_0"),
        ({"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}, "9"),  # a task, or a job that a task has sent
        ({"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "OURS": "9"}, "7_1"),  # as our script says
        ({"JOB_ID": "9", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1", "OURS": "8"}, "9"),  # sent from inside that task
        ({"JOB_ID": "7", "HET_SIZE": "2", "JOB_ID_HET_GROUP_0": "7", "JOB_ID_HET_GROUP_1": "8"}, "7"),
        ({"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}, None),
    ],
)
def test_which_job(variables: dict[str, str], job: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.delenv(ARRAY_TASK, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(ARRAY_TASK if name == "OURS" else f"SLURM_{name}", value)
    assert (job_id(), restart_count()) == (job, 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert restart_count() == 2
