"""Choose the column of a table that holds the prompts: the given one, or the only one that can hold them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abliterate.errors import InputError

FORMS = (
    "a text file with one prompt on each line, a .csv, .tsv, .json, .jsonl or .parquet file, which may be followed by its "
    "column (file.csv:goal), or a data set as name:split:column or /absolute/folder:split:column"
)
# The usual names of columns with prompts, the first of which wins over the others.
USUAL = ("prompt", "goal", "text", "instruction", "question", "behavior", "behaviour", "query", "request", "forbidden prompt")
# Further names that stand in the headers of such tables.
_BESIDE = {
    *("", "id", "index", "target", "category", "label", "type", "source", "system", "answer", "response", "output", "input"),
    *("behaviorid", "functionalcategory", "semanticcategory", "tags", "contextstring", "subcategory", "split", "language"),
}
_LONGEST_NAME = 40
_MOST_WORDS = 3
_SHOWN = 12


def choose_column(path: Path, names: Sequence[str], given: str, values: Callable[[int], Sequence[Any]]) -> int:
    """The index of the column that `given` names or, without it, of the only one that can hold prompts.

    `values` returns the values of the column with that index.

    Raises:
        InputError: there is no such column, or several columns can hold prompts.
    """
    if given:
        return _named(path, names, given)
    found = _usual(names)
    if len(found) == 0:
        # Without a usual name only the content tells: an index or a category is no sentence.
        others = [index for index, name in enumerate(names) if name and _plain(name) != "system"]
        found = [0] if len(names) == 1 else [index for index in others if _is_text(values(index))]
    if len(found) != 1:
        example = names[found[0]] if found else "goal"
        raise InputError(
            f"The file {path} doesn't say which of its columns ({shown(names)}) holds the prompts; name it as in "
            f"{path.name}:{example}."
        )
    return found[0]


def shown(names: Sequence[str]) -> str:
    """The names of columns as a sentence shows them."""
    more = ", …" if len(names) > _SHOWN else ""
    return ", ".join(name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "…" for name in names[:_SHOWN]) + more


def can_be_header(cells: Sequence[str]) -> bool:
    """Whether a table's first row can be its header: a usual name is among them, or all are short and no sentences."""
    return bool(_usual(cells)) or all(
        len(cell) <= _LONGEST_NAME and len(cell.split()) <= _MOST_WORDS and not cell.endswith((".", "?", "!")) for cell in cells
    )


def is_header(line: str) -> bool:
    """Whether a line of text is the header of a table with prompts and can be no prompt itself, as in `goal,target`."""
    names = {_plain(cell.strip().strip("\"'")) for cell in re.split(r"[,;\t|]", line)}
    return bool(names & {*USUAL}) and names <= {*USUAL, *_BESIDE}


def _named(path: Path, names: Sequence[str], given: str) -> int:
    found = [index for index, name in enumerate(names) if name == given]
    found = found or [index for index, name in enumerate(names) if _plain(name) == _plain(given)]
    if len(found) > 1:
        raise InputError(f"The file {path} has {len(found)} columns {given!r}; give each its own name.")
    if not found:
        raise InputError(f"The file {path} has no column {given!r}; name one of {shown(names)}.")
    return found[0]


def _usual(names: Sequence[str]) -> list[int]:
    """The indices of the columns with a usual name; of `prompt` alone if it is there."""
    plain = [_plain(name) for name in names]
    return [index for index, name in enumerate(plain) if name == USUAL[0]] or [
        index for index, name in enumerate(plain) if name in USUAL
    ]


def _is_text(values: Sequence[Any]) -> bool:
    """Whether most of the values that are there are texts of several words."""
    there = [value for value in values if value is not None and value != ""]
    return sum(isinstance(value, str) and len(value.split()) > 1 for value in there) * 2 > len(there)


def _plain(name: str) -> str:
    return re.sub(r"[_\- ]+", " ", name.strip().lower())
