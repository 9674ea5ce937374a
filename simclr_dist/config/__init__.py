"""Read and check the settings of a run."""
