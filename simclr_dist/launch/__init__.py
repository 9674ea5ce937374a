"""Start ranks and outlive them: here, on several machines, under SLURM."""
