"""Shards behind a URL: fetched, kept on the local disk, and fetched ahead."""
