"""Results as tables on the terminal. With `console`, all of Rich."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from abliterate.objectives import DEFAULT, in_words, objectives_from_result, other_names
from abliterate.types import Trial

# What would move the cursor, clear the screen, change colours, or turn text around; and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Text of anybody's making as a terminal may be given it: control characters as they are written in Python."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def make_console() -> Console:
    """A console for tables on standard output."""
    return Console()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", right: Container[str] = ()) -> None:
    """A table of plain text on standard output: ruled on a terminal, in a pipe aligned lines that never wrap.

    `right`: the columns whose cells stand at the right.
    """
    console = make_console()
    if not console.is_terminal:
        _print_plain(columns, list(rows), title, right)
        return
    console.print(_ruled(columns, rows, title, right))


def print_marked(before: str, text: str, spans: Iterable[Sequence[int]]) -> None:
    """Foreign text of several lines with parts of it highlighted, in a pipe in brackets; none of it controls the terminal."""
    shown, place = Text(before, style="dim"), 0
    console = make_console()
    left, right = ("", "") if console.is_terminal else ("[", "]")
    for start, end in spans:
        shown.append(printable(text[place:start], "\n\t"), style="not dim")
        shown.append(left + printable(text[start:end], "\n\t") + right, style="not dim bold reverse")
        place = end
    shown.append(printable(text[place:], "\n\t"), style="not dim")
    if console.is_terminal:
        console.print(shown)
    else:
        print(shown.plain)


def _ruled(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str, right: Container[str]) -> Table:
    """As Rich's table."""
    table = Table(title=escape(title) or None, title_justify="left")
    for column in columns:
        table.add_column(escape(printable(column)), justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    return table


def _print_plain(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, right: Container[str]) -> None:
    if title:
        print(title)
    # One entry a line, whatever a cell holds.
    lines = [[printable(" ".join(cell.split())) for cell in row] for row in (columns, *rows)]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        cells = []
        for name, cell, width in zip(columns, line, widths, strict=True):
            space = " " * (width - cell_len(cell))
            cells.append(space + cell if name in right else cell + space)
        print("  ".join(cells).rstrip())


# What a narrow terminal leaves out of a table of trials, after the kernels.
_DISPENSABLE = (("scope", "direction"), ("KL median", "KL max"))
# Of what no terminal is: Rich measures a table only up to the width it is given.
_WIDEST = 10_000
# A reason may take several lines, of this width at least.
_FOLDED = 24
_NUMBERS = ("trial", "refusals", "KL mean", "KL median", "KL max", "seconds", "direction")


def front_title(result: Mapping[str, Any]) -> str:
    """What stands above a front."""
    objectives = objectives_from_result(result)
    if objectives == DEFAULT:
        return "Front: every trial that no other beats on both scores"
    return f"Front: every trial that no other beats on {in_words(objectives)}"


def print_trials(result: Mapping[str, Any], trials: Sequence[Trial], chosen: Sequence[Trial], conditions: str) -> None:
    """The front, then all trials; where there are conditions, only the trials `chosen` by them."""
    if not trials:
        print("no trial has finished yet")
        return
    total = result["baseline"]["prompts"]
    if not conditions:
        on_front = {trial.number: trial for trial in trials}
        front = [on_front[number] for number in result["front"]]
        title = front_title(result) if front else "Front: no trial beats the model itself"
        _print_trials(title, front, result, base=True)
        print()
    which = f"{len(chosen)} of {len(trials)} trials: {conditions}" if conditions else f"All {len(trials)} trials"
    _print_trials(which + f"; the model itself refuses {result['baseline']['refusals']}/{total}", chosen, result)
    if make_console().is_terminal:
        make_console().print("→ selected  ★ front  ≥ at least: stopped early", style="dim", highlight=False)


def _print_trials(title: str, trials: Sequence[Trial], result: Mapping[str, Any], *, base: bool = False) -> None:
    rows = [_trial_cells(trial, result) for trial in trials]
    components = list(dict.fromkeys(name for trial in trials for name in trial.params.kernels))
    others = other_names({name for trial in trials for name in trial.values}, objectives_from_result(result))
    columns = ["", "trial", "state", "refusals", "KL mean", "KL median", "KL max", *others]
    columns += ["seconds", "scope", "direction", *components]
    if any(trial.reason for trial in trials):
        columns.append("reason")
    if base:
        baseline = result["baseline"]
        counts = {"trial": "base", "refusals": f"{baseline['refusals']}/{baseline['prompts']}"}
        values = {name: f"{value:.4g}" for name, value in baseline.get("values", {}).items()}
        rows.insert(0, counts | dict.fromkeys(("KL mean", "KL median", "KL max"), "0") | values)
    numbers = (*_NUMBERS, *others)
    console, left_out = make_console(), False
    if console.is_terminal:
        for gone in ((), components, *_DISPENSABLE):
            left_out = left_out or bool(set(gone) & set(columns))
            columns = [name for name in columns if name not in gone]
            short = [row | ({"reason": row["reason"][:_FOLDED]} if "reason" in row else {}) for row in rows]
            table = _ruled(columns, [[row.get(name, "") for name in columns] for row in short], "", numbers)
            if console.measure(table, options=console.options.update(width=_WIDEST)).maximum <= console.width:
                break
    print_table(columns, [[row.get(name, "") for name in columns] for row in rows], title, numbers)
    if components and components[0] in columns and console.is_terminal:
        console.print("components: largest coeff @ its layer → coeff at the edge ± layers to the edge", style="dim")
    if left_out:
        console.print("A wider terminal, a pipe or --csv shows all columns.", style="dim")


def _trial_cells(trial: Trial, result: Mapping[str, Any]) -> dict[str, str]:
    """One trial's cells by column; what it doesn't have is left out."""
    cells = {
        "": "→" if trial.number == result["selected"] else "★" if trial.number in result["front"] else "",
        "trial": str(trial.number),
        "state": trial.state,
        "seconds": f"{trial.seconds:.1f}",
        "scope": trial.params.scope,
        "direction": f"{trial.params.direction_index:.2f}" if trial.params.scope == "global" else "",
        "reason": trial.reason,
    }
    if "refusals" in trial.scores:
        bound = "≥" if trial.state == "stopped" else ""
        cells["refusals"] = f"{bound}{trial.refusals}/{result['baseline']['prompts']}"
    if "kl" in trial.scores:
        cells |= {f"KL {name}": f"{trial.scores['kl'][name]:.4f}" for name in ("mean", "median", "max")}
    cells |= {name: f"{trial.values[name]:.4g}" for name in other_names(trial.values)}
    for name, kernel in trial.params.kernels.items():
        from_to = f"{kernel.max_coeff:.2f} @ {kernel.position:.1f} → {kernel.min_coeff:.2f}"
        cells[name] = f"{from_to} ± {kernel.distance:.1f}" if kernel.max_coeff else "off"
    return cells


def front_table(result: Mapping[str, Any], marked: int | None = None) -> Table:
    """The front as a table, the selected trial marked; the baseline as its first row."""
    selected = result["selected"] if marked is None else marked
    total = result["baseline"]["prompts"]
    by_number = {record["number"]: Trial.from_record(record) for record in result["trials"]}
    names = {name for number in result["front"] for name in by_number[number].values}
    others, base = other_names(names, objectives_from_result(result)), result["baseline"].get("values", {})
    table = Table(title=escape(printable(front_title(result))), title_justify="left")
    for column in ("", "trial", "refusals", "KL mean", "KL median", "KL max", *others):
        table.add_column(escape(printable(column)), justify="right")
    values = [f"{base[name]:.4g}" if name in base else "" for name in others]
    table.add_row("", "base", f"{result['baseline']['refusals']}/{total}", "0", "0", "0", *values, style="dim")
    for number in result["front"]:
        trial = by_number[number]
        kl = trial.scores["kl"]
        cells = [f"{kl[name]:.4f}" for name in ("mean", "median", "max")]
        cells += [f"{trial.values[name]:.4g}" if name in trial.values else "" for name in others]
        style = "bold green" if number == selected else None
        table.add_row("→" if number == selected else "", str(number), f"{trial.refusals}/{total}", *cells, style=style)
    return table


def component_table(coverage: Mapping[str, Any]) -> Table:
    """What writes to the residual stream, and whether it is edited; `coverage` as in `requirements.requirements_of`."""
    total = sum(group["parameters"] for group in coverage["groups"])
    table = Table(title="What writes to the residual stream", title_justify="left")
    for column, justify in (("component", "left"), ("module", "left"), ("layers", "right"), ("matrices", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("d_out × d_in", "parameters", "share"):
        table.add_column(column, justify="right")
    table.add_column("edited")
    for group in coverage["groups"]:
        shape = " × ".join(map(str, group["shape"])) if group["shape"] else "?"
        counts = [str(group["layers"]), str(group["matrices"]), shape, f"{group['parameters']:,}"]
        edited = "[green]yes[/]" if group["edited"] else f"[yellow]no: {escape(printable(group['left_out']))}[/]"
        cells = [
            *(escape(printable(group[name])) for name in ("component", "path")),
            *counts,
            f"{group['parameters'] / total:.1%}",
        ]
        table.add_row(*cells, edited)
    return table


def heldout_lines(heldout: Mapping[str, Any]) -> Iterable[str]:
    """What was measured on held-out prompts, as plain lines; `heldout` as in `result.json`."""
    base, found, search = heldout["base"], heldout["candidate"], heldout["search"]
    in_search = f"; in the search {_rate(search['refusals'])}" if search else ""
    yield f"held out: refusals {_rate(base['refusals'])} → {_rate(found['refusals'])}{in_search}"
    faults = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["faults"].items() if count)
    yield f"held out: answered {_rate(found['answered'])}" + (f"; faults: {faults}" if faults else "")
    kl, answers, perplexity = heldout["kl"], heldout["kl_answers"], heldout["perplexity"]
    beside = f" (in the search {search['kl']['mean']:.4f})" if search else ""
    yield (
        f"held out: KL first token {kl['mean']:.4f}{beside}, median {kl['median']:.4f}, max {kl['max']:.4f}; over the base's "
        f"answers {answers['mean']:.4f} a token, max {answers['max']:.4f}"
    )
    yield f"held out: perplexity of the base's answers {perplexity['base']:.4f} → {perplexity['candidate']:.4f}"
    same = heldout["unchanged"]
    where = f", the others from token {same['first_difference']:.1f} on" if same["first_difference"] is not None else ""
    yield f"held out: harmless answers unchanged {_rate(same)}{where}"
    if found["over_refusals"]:
        before = _rate(base["over_refusals"])
        yield f"held out: refusals of harmless prompts that look harmful {before} → {_rate(found['over_refusals'])}"
    for judge in heldout["judges"]:
        if judge["error"]:
            yield f"held out: {judge['name']} gives no verdicts: {judge['error']}"
            continue
        differ = len(judge["disagreements"])
        yield (
            f"held out: {judge['name']} sees refusals {_rate(judge['base'])} → {_rate(judge['candidate'])}, "
            f"{differ} unlike the markers"
        )
    for name, one in heldout["scores"].items():
        if one.get("error"):  # earlier versions' have none
            yield f"held out: {name} gives no score: {one['error']}"
        elif one.get("values"):
            yield f"held out: {name} {one['values']['base']:.4g} → {one['values']['candidate']:.4g}"


def _rate(rate: Mapping[str, Any]) -> str:
    """`3/100 [0.6 %, 8.5 %]`."""
    return f"{rate['count']}/{rate['prompts']} [{100 * rate['low']:.1f} %, {100 * rate['high']:.1f} %]"
