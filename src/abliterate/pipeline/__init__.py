"""What `abliterate X` does to a model is `pipeline/X.py`; everything here is usable without a command line."""
