"""Handle files, signals, output, errors and versions."""
