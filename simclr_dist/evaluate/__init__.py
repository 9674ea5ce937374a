"""Evaluate an encoder: frozen features, kNN, a linear probe, and their report."""
