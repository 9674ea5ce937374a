"""Images of any source into shards."""
