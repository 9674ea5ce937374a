"""Send runs to SLURM as jobs. This room knows what is asked of SLURM, what is submitted, and what becomes of it."""
