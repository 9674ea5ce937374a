#!/usr/bin/env bash
# submitit's JobEnvironment takes the nodes from SLURM's variables of the job and the tasks from those of the step. In a step of
# fewer nodes than its job (`srun --nodes=1 --nodelist=n3 --ntasks=2` in a job of n1 to n3) the two do not fit together:
# hostnames[0], which its users take for the address of rank 0, is a machine without any task, and all wait for it.
#
# Seen with submitit 1.5.4, with the variables that SLURM 22.05 sets in such a step. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check submitit==1.5.4

export SUBMITIT_EXECUTOR=slurm SLURM_JOB_ID=7 SLURM_JOB_NODELIST='n[1-3]' SLURM_JOB_NUM_NODES=3
export SLURM_STEP_NODELIST=n3 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=2 SLURM_NNODES=1
export SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
venv/bin/python - <<'EOF_PYTHON'
import submitit

task = submitit.JobEnvironment()
print("submitit", submitit.__version__, task.hostnames, "nodes:", task.num_nodes, "tasks:", task.num_tasks)
assert (task.hostnames, task.num_nodes, task.num_tasks) == (["n1", "n2", "n3"], 3, 2)
EOF_PYTHON
echo "as described: two tasks of n3, and the first host name is n1"
