"""Make an encoder's features once for each image; keep them in files."""
