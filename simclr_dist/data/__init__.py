"""Images to shards, shards to batches of two views."""
