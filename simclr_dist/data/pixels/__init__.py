"""Decode bytes to pixels, and resize pixels."""
