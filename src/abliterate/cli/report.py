"""`abliterate report`: write a run's page again, save its plots as images, and show both on the terminal. It loads no model."""

from __future__ import annotations

import sys
from pathlib import Path

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError
from abliterate.files import write_atomically
from abliterate.report import draw
from abliterate.report.data import Material, gather
from abliterate.report.page import render
from abliterate.report.plots import all_plots
from abliterate.report.terminal import show
from abliterate.terminal.tables import printable


def report(path: Path, png: Path | None, terminal: bool) -> None:
    """Write `report.html` and print its path; `png`: a folder for the plots; `terminal`: show the report here, too."""
    directory = RunDirectory(path)
    material = gather(directory)
    # Without a warning, a page that says less than the last one would replace it unnoticed.
    for text in (material.doubt, *(material.missing.get(name, "") for name in ("settings", "geometry", "answers"))):
        if text:
            _warn(text)
    pictures = {} if png is None else _pictures(material, png)
    write_atomically(directory.report, render(material, _warn))
    if terminal:
        show(material)
    print(printable(str(directory.report)))
    for picture, content in pictures.items():
        write_atomically(picture, content)
        print(printable(str(picture)))


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def _pictures(material: Material, folder: Path) -> dict[Path, bytes]:
    """The images to write into the folder, which is made. They come before anything else, since they are what can fail."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = draw.png({plot.name: plot.spec for plot in all_plots(material)})
    except draw.Undrawable as error:
        raise AbliterateError(str(error)) from error
    except OSError as error:
        raise InputError(f"The folder {folder} can't be made: {error.strerror}; choose another --png.") from error
    return {folder / f"{name}.png": content for name, content in drawn.items()}
