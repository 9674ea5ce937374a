"""Preflight: what training needs of these machines, tried on them; `command.py` is the page."""
