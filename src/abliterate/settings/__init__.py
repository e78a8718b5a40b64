"""Every setting with its default, and where settings come from."""
