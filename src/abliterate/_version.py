"""The version of this package, which everything that is written carries."""

__version__ = "0.1.0"
