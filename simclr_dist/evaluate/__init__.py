"""The evaluation job: frozen features, kNN, a linear probe, and their report."""
