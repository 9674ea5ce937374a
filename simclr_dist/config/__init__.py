"""Settings: their types, ranges and meanings, and where they are read from."""
