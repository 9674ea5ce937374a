"""Shards to batches of two views."""
