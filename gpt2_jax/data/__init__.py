"""From text to batches: files, token shards, windows, and batch(step)."""
