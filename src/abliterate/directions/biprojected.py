"""The projected mean difference, made orthogonal to the harmless mean of the layer that is edited, too.

A direction that is measured in one layer and removed from modules of other layers disturbs what harmless prompts have in common
there: their mean changes from layer to layer (norm-preserving biprojected abliteration, grimjim 2025:
huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration). `Directions.blends` takes the second step. A
direction of its own layer needs none in a module that writes.
"""

from __future__ import annotations

from abliterate.directions.projected import Projected


class Biprojected(Projected):
    """d ← normalize(d − (d·h) h) twice: with h of the layer where d is measured, and with h of the layer that is edited."""

    name = "biprojected"
    biprojects = True
