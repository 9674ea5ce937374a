"""Compute SimCLR over all ranks, from plain arguments."""
