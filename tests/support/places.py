"""Where in the package an operation of torch was called, for counters of operations."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import torch

import abliterate

_OWN, _TORCH, _HERE = (str(Path(path).parent) for path in (abliterate.__file__, torch.__file__, __file__))


def place() -> str:
    """The innermost frame outside torch and this folder: `file: function` of this package, or "model"."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        path = frame.f_code.co_filename
        if path.startswith((_HERE, _TORCH)):
            continue
        return f"{Path(path).name}: {frame.f_code.co_name}" if path.startswith(_OWN) else "model"
    return "model"
