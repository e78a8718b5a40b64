"""The shell scripts: what can be checked without running them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.paths import ROOT

SCRIPTS = [path for path in sorted((ROOT / "scripts").iterdir()) if path.suffix == ""]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.is_file()], ids=lambda path: path.name)
def test_scripts_run_in_the_bash_of_a_mac(path: Path) -> None:
    """bash 3.2 under `set -u` aborts at an empty array unless it is written as ${name[@]+"${name[@]}"}."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash")
    assert not re.search(r'(?<!\+)"\$\{\w+\[@\]\}"', text)
    assert not re.search(r"\b(nproc|mapfile|readarray|readlink -f)\b", text)
