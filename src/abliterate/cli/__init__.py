"""What `abliterate X` does on the command line is `cli/X.py`."""
