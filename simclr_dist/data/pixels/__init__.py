"""Encoded bytes to pixels, and pixels to other sizes."""
