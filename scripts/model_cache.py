"""Where the scripts keep the models that they make: outside the repository, each folder whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "ABLITERATE_MODELS"


def models_folder() -> Path:
    """The folder named by the environment variable ABLITERATE_MODELS, else ~/.cache/abliterate-models."""
    return Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "abliterate-models")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place once the block has ended well, so that no half-made model is ever seen."""
    building = out.with_name(out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    for file in building.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    building.rename(out)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, with plain newlines on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
