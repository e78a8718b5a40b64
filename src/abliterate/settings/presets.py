"""The files in `configs/`: the defaults with their comments, the presets, and the refusal markers.

It is as light at import as `cli`, because shell completion lists the presets.
"""

from __future__ import annotations

from pathlib import Path

from abliterate.errors import InputError

DEFAULTS = "default.toml"


def config_path(name: str) -> Path:
    """The path of a file in `configs/`: in the installed package, or at the top of the source tree (editable installs)."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"The file configs/{name} is missing from this installation; reinstall abliterate.")


def presets() -> list[str]:
    """The names of the presets that `-c` takes, in alphabetical order; `default` is the defaults themselves."""
    return sorted(path.stem for path in config_path(DEFAULTS).parent.glob("*.toml"))
