"""Starts ranks and outlives them: here, on several machines, under SLURM."""
