"""Fetch shards behind a URL, ahead of need. Keep them on the local disk."""
