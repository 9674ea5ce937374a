"""Convert images of any source into shards."""
