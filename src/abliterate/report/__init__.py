"""Show people the result of a run: its tables, its page with plots, and the same on the terminal."""
