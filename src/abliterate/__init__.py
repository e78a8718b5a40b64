"""abliterate: removes one behaviour from an open-weight language model by directional ablation."""

__version__ = "0.1.0"
