"""The work behind each command: `pipeline/X.py` has the work of `abliterate X`, and can be used without a command line."""
