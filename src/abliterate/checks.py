"""Names in the settings that must stand for something: all looked up before a run is prepared or a model loaded.

A name found wrong later would already be part of the run directory, and no corrected one could continue it.
"""

from __future__ import annotations

import difflib

from abliterate.bench import objectives_of, scorers_of
from abliterate.directions import direction_method
from abliterate.edits import edit_method
from abliterate.errors import InputError
from abliterate.export.push import check_push
from abliterate.front import SelectionRule, parse_rule
from abliterate.model.architectures import ARCHITECTURES
from abliterate.model.devices import choose_device
from abliterate.settings import Settings


def check_names(settings: Settings) -> SelectionRule:
    """InputError for the first name that stands for nothing; returns the rule that `search.select` stands for."""
    direction_method(settings.directions.method)
    edit_method(settings.edit.mode)
    scorers_of(settings, heldout=True)
    scorers = scorers_of(settings)
    rule = parse_rule(settings.search.select, settings.search.select_max_kl, objectives_of(settings, scorers))
    names = [scorer.name for scorer in scorers]
    if rule.scorer and rule.scorer not in names:
        raise InputError(f"The selection {rule.text!r} names no scorer of this run; it has {', '.join(names)}.")
    choose_device(settings.device)
    check_push(settings.export)
    check_components(settings)
    return rule


def check_components(settings: Settings) -> None:
    """InputError where `search.max_coeff` has a range for a component that can't exist: it would be left unused."""
    built_in = {name for row in ARCHITECTURES for name in row.components}
    known = sorted({"default", *built_in, *settings.load.components})
    for name in settings.search.max_coeff:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
            remedy = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}."
            raise InputError(f"The setting search.max_coeff names {name!r}, which is no component; {remedy}")
