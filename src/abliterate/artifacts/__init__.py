"""Everything that outlives a process: the run directory, `result.json`, and the cache that runs share."""
