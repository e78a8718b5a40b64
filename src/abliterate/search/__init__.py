"""The study: its search space, sampler, storage and pruning, and the front of its trials."""
