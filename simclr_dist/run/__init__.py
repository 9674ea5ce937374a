"""Manage a run folder: who holds it, and its checkpoints. Also what became of it, and whether it starts again."""
