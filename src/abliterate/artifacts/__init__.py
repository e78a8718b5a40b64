"""What lasts: the run directory, `result.json`, and the cache that runs share."""
