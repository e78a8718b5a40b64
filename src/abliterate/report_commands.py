"""`abliterate report`: the page again, the plots as images, and the same on the terminal. Loads no model."""

from __future__ import annotations

from pathlib import Path

from abliterate.errors import AbliterateError, InputError
from abliterate.report import drawing
from abliterate.report.html import render
from abliterate.report.material import Material, gather
from abliterate.report.plots import all_plots
from abliterate.rundir import RunDirectory, write_atomically
from abliterate.terminal_report import show


def report(path: Path, png: Path | None, terminal: bool) -> None:
    """Write `report.html` and say where; `png`: a folder for the plots; `terminal`: show it here, too."""
    directory = RunDirectory(path)
    material = gather(directory)
    if png is not None:
        _check_pictures(png)
    write_atomically(directory.report, render(material))
    if terminal:
        show(material)
    print(_plain(directory.report))
    if png is not None:
        for written in _pictures(material, png):
            print(_plain(written))


def _check_pictures(folder: Path) -> None:
    """Before anything is written: the option can't be followed where nothing can be drawn."""
    if drawing.unavailable():
        raise AbliterateError(drawing.unavailable())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} can't be made: {error.strerror}; choose another --png.") from error


def _pictures(material: Material, folder: Path) -> list[Path]:
    written = []
    for plot in all_plots(material):
        write_atomically(folder / f"{plot.name}.png", drawing.png(plot.spec))
        written.append(folder / f"{plot.name}.png")
    return written


def _plain(path: Path) -> str:
    """A path that can't play tricks with a terminal."""
    text = str(path)
    return text if text.isprintable() else ascii(text)[1:-1]
