"""A run folder: who holds it, its checkpoints, and what became of it."""
