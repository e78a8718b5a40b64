"""Prompt sets: read from files, Hub data sets or the demo."""
