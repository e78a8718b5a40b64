"""Check what an sdist and a wheel of this checkout hold: `python scripts/check_package.py FOLDER`.

The sdist must hold every file that git tracks in the folders and files that it includes, and nothing else; the wheel must hold
the whole package, with the demo, the configs and the type marker. Both must have the version of `_version.py`.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Files that the build adds to every sdist.
ADDED = {"PKG-INFO", "pyproject.toml", ".gitignore"}


def version() -> str:
    """The version, from its only place."""
    return runpy.run_path(str(ROOT / "src" / "abliterate" / "_version.py"))["__version__"]


def tracked() -> set[str]:
    """The files that the sdist should hold, by their paths in the checkout."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    command = ["git", "ls-files", "-z", "--", *included]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {path for path in listed if path and (ROOT / path).is_file()}


def in_wheel(paths: Iterable[str]) -> set[str]:
    """The wheel's paths of files of the checkout: those of the package, and the configs within it."""
    moved = {"src/abliterate/": "abliterate/", "configs/": "abliterate/configs/"}
    return {to + path.removeprefix(start) for path in paths for start, to in moved.items() if path.startswith(start)}


def faults(sdist: set[str], wheel: set[str], expected: set[str]) -> list[str]:
    """One sentence for each fault; `sdist` without its top folder, `wheel` without its metadata, `expected` as `tracked`."""
    pairs = {"sdist": (sdist - ADDED, expected - ADDED), "wheel": (wheel, in_wheel(expected))}
    found = []
    for name, (held, wanted) in pairs.items():
        found += [f"The {name} lacks {path}; see the build targets of pyproject.toml." for path in sorted(wanted - held)]
        found += [f"The {name} holds {path}, which git doesn't track; add or remove it." for path in sorted(held - wanted)]
    found += [] if "abliterate/py.typed" in wheel else ["The wheel has no py.typed, so type checkers would ignore its types."]
    return found


def main(folder: Path) -> int:
    """Print the faults of the two files in `folder`; 0 if there are none."""
    name = f"abliterate-{version()}"
    source, built = folder / f"{name}.tar.gz", folder / f"{name}-py3-none-any.whl"
    if {path.name for path in folder.iterdir()} != {source.name, built.name}:
        print(f"{folder} must hold {source.name} and {built.name} alone; build them again.", file=sys.stderr)
        return 1
    with tarfile.open(source) as archive:
        sdist = {member.name.removeprefix(f"{name}/") for member in archive if member.isfile()}
    with zipfile.ZipFile(built) as archive:
        wheel = {path for path in archive.namelist() if not path.startswith(f"{name}.dist-info/")}
    found = faults(sdist, wheel, tracked())
    print(*found or [f"{name}: {len(sdist)} files in the sdist, {len(wheel)} in the wheel"], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
