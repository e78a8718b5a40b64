"""The version of this package, which everything that is written carries; pyproject.toml reads it from here."""

__version__ = "0.1.0"
