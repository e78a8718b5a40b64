"""What `abliterate X` does to a model is in `pipeline/X.py`; all of it can be used without a command line."""
