"""Measurements of a trial or a candidate model: search scores, held-out prompts, teacher forcing, lm-eval tasks."""
