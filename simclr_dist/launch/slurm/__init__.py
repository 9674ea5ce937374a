"""Runs as SLURM jobs: what is asked of SLURM, what is submitted, and what becomes of it."""
