"""Read one column of a table as prompts: CSV and TSV files, and parquet files through pyarrow. A header is never a prompt."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, first_line
from abliterate.prompts.columns import can_be_header, choose_column

SEPARATED = (".csv", ".tsv", ".tab")
PARQUET = (".parquet",)


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one column in their order, the column's name, and the names of all columns."""

    texts: tuple[str, ...]
    column: str
    names: tuple[str, ...]


def read_separated(path: Path, content: str, column: str) -> Texts:
    """A column of a CSV or TSV file, whose first row is its header; blank cells are left out.

    Raises:
        InputError: the file has no header, a row has another number of cells, quotes don't match, or no column fits.
    """
    rows = _rows(path, content)
    if not rows:
        raise InputError(f"The prompt file {path} holds no prompts; put a header in its first row and prompts below it.")
    names, body = tuple(rows[0][1]), rows[1:]
    if not column and not can_be_header(names):
        raise InputError(
            f"The first row of {path} can't be a header, for it reads like a prompt; put the names of the columns above it, or "
            "save the prompts as a text file, one on each line."
        )
    for line, cells in body:
        if len(cells) != len(names):
            raise InputError(
                f"The row that ends in line {line} of {path} has {len(cells)} cells, but the header has {len(names)}; put "
                'texts with a separator in them in quotes ("…").'
            )
    index = choose_column(path, names, column, lambda index: [cells[index] for _, cells in body])
    return Texts(tuple(cells[index] for _, cells in body if cells[index]), names[index], names)


def read_parquet(path: Path, column: str) -> Texts:
    """A column of a parquet file; null and blank cells are left out.

    Raises:
        InputError: pyarrow is missing, the file is damaged, no column fits, or the column isn't text.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"The parquet file {path} needs the package pyarrow; install it with pip install pyarrow, or save the prompts as "
            "CSV."
        ) from error
    try:
        with path.open("rb") as file:  # pyarrow would take some names for addresses of other machines
            table = parquet.read_table(file)
        names = tuple(table.column_names)
        index = choose_column(path, names, column, lambda index: table.column(index).to_pylist())
        values: Sequence[Any] = table.column(index).to_pylist()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"The prompt file {path} can't be read: {error.strerror or first_line(error)}.") from error
    except Exception as error:  # pyarrow's errors have no common base
        raise InputError(f"The prompt file {path} is no parquet file ({first_line(error)}); save it again.") from error
    other = next((value for value in values if value is not None and not isinstance(value, str)), None)
    if other is not None:
        raise InputError(
            f"The column {names[index]!r} of {path} holds {type(other).__name__} values, not text; name a column of text."
        )
    return Texts(tuple(text for text in values if text and text.strip()), names[index], names)


def _rows(path: Path, content: str) -> list[tuple[int, list[str]]]:
    """(number of its last line, cells) of every row that isn't blank."""
    lines = io.StringIO(content, newline="")  # `str.splitlines()` would also cut at U+2028, which may stand inside a prompt
    separator = "\t" if path.suffix.lower() != ".csv" else _separator(content)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator != "\t", strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        kind = path.suffix[1:].upper()
        raise InputError(f"Line {reader.line_num} of {path} is no {kind} ({error}); check its quotes.") from error
    return [(number, cells) for number, cells in rows if any(cells)]


def _separator(content: str) -> str:
    """The separator of a CSV file: some programs write semicolons or tabs, and the header shows which."""
    header = content.lstrip("\r\n").partition("\n")[0]
    return max(",;\t|", key=header.count)
