"""Check everything that can be checked before an hour is spent: names in the settings, the model, its coverage, the export.

A wrong name that is noticed later would already be stored in the run directory, and a corrected name couldn't continue the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

import torch
from transformers import PretrainedConfig

from abliterate.artifacts.refined import LARGEST, file_bytes
from abliterate.edits import (
    AUTO,
    check_several,
    edit_method,
    is_learned,
    is_refinable,
    needs_inputs,
    reading_method,
    scales_columns,
    scales_rows,
)
from abliterate.errors import InputError
from abliterate.export import check_kind
from abliterate.export.adapter import peft_refusal
from abliterate.model import loader
from abliterate.model.architectures import (
    ARCHITECTURES,
    READERS,
    Architecture,
    Target,
    is_built_in,
    kind_names,
    known_architecture,
    members,
)
from abliterate.model.coverage import check_coverage, coverage_of
from abliterate.model.devices import choose_device
from abliterate.model.experts import is_fused
from abliterate.model.hub import check_push
from abliterate.model.inputs import UNCAPTURED, refuse_uncaptured
from abliterate.model.loader import LoadedModel
from abliterate.model.readers import gains_of
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import direction_count, objectives_of, scorers_of
from abliterate.search.samplers import check_packages
from abliterate.search.selection import SelectionRule, parse_rule
from abliterate.settings.schema import SearchSettings, Settings


def check_model(settings: Settings, *, editing: bool = True) -> None:
    """Raise InputError if the model can't be found, or can't be edited or exported as far as its config tells.

    Without `editing`, only a model that can't be loaded is an error.
    """
    skeleton = loader.skeleton(settings.model, settings.load, torch.device("cpu"), weights=True)
    if editing and skeleton is not None:
        check_edit(settings, skeleton.architecture, skeleton.targets)
        check_export(settings, skeleton.model.config, skeleton.targets)
        coverage = coverage_of(skeleton.model, skeleton.architecture, skeleton.targets)
        check_coverage(coverage, allow_partial=settings.load.allow_partial)


def check_edit(settings: Settings, architecture: Architecture, targets: Collection[Target]) -> None:
    """Raise InputError if the edit mode needs inputs that can't be captured, or edits no modules that read."""
    if any(target.reads for target in targets):
        reading_method(edit_method(settings.edit.mode))
    if needs_inputs(edit_method(settings.edit.mode)):
        refuse_uncaptured(tuple(targets), settings.edit.mode)
        if _family(architecture) in UNCAPTURED:
            raise InputError(
                f"The edit mode {settings.edit.mode!r} needs the inputs of modules, which can't be captured in the family "
                f"{_family(architecture)}; choose another --set edit.mode."
            )


def _family(architecture: Architecture) -> str:
    """The name of the family in the table, also where settings name the modules; otherwise the architecture's own."""
    row = known_architecture(architecture.model_types[0]) if architecture.model_types else None
    return (row or architecture).family


def check_export(settings: Settings, config: PretrainedConfig, targets: Collection[Target]) -> None:
    """Raise InputError before a run if the chosen kind of export can't hold edits of these modules."""
    reason = adapter_refusal(settings, config, targets) if settings.export.kind == "adapter" else ""
    if reason:
        raise InputError(f"An adapter can't hold edits of this model ({reason}); choose --export merged, or none.")


def adapter_refusal(settings: Settings, config: PretrainedConfig, targets: Collection[Target]) -> str:
    """The reason why an adapter can't hold edits of these modules, or ""."""
    return mode_refusal(settings) or peft_refusal(config, settings.load, targets, dora=_is_dora(settings))


def mode_refusal(settings: Settings) -> str:
    """The reason why no adapter can hold the edits of this mode, whatever the modules, or ""."""
    edit = settings.edit
    scaled = edit.representation == "exact" and scales_columns(edit_method(edit.mode))
    return f"the edit mode {edit.mode!r} scales columns, as neither LoRA nor DoRA does" if scaled else ""


def adapter_method(settings: Settings) -> str:
    """PEFT's name for the adapter that these settings export: "dora" or "lora"; "" if they export none."""
    if settings.export.kind != "adapter":
        return ""
    return "dora" if _is_dora(settings) else "lora"


def note_adapter(context: Context) -> None:
    """Say at the start of a run which programs can't load the adapter that it will export."""
    if adapter_method(context.settings) == "dora":
        context.reporter.note(
            "the adapter will be DoRA, which PEFT loads but vLLM and llama.cpp don't; --set edit.mode=pre makes a plain LoRA, "
            "and --export merged a whole model"
        )


def _is_dora(settings: Settings) -> bool:
    return settings.edit.representation == "exact" and scales_rows(edit_method(settings.edit.mode))


def check_loaded(context: Context, loaded: LoadedModel) -> None:
    """Repeat the checks of `check_model` that need weights, and warn of modules that stay unedited."""
    settings = context.settings
    check_edit(settings, loaded.architecture, loaded.targets)
    gains_of(loaded.model, loaded.targets, loaded.info.d_model)  # a norm that can't be read through is an error
    check_refined_size(settings, len(loaded.targets), loaded.info.d_model)
    if loaded.architecture.found_by == "structure":
        check_export(settings, loaded.model.config, loaded.targets)
    coverage = coverage_of(loaded.model, loaded.architecture, loaded.targets)
    check_coverage(coverage, allow_partial=settings.load.allow_partial, warn=context.reporter.warn)


def check_refined_size(settings: Settings, modules: int, d_model: int) -> None:
    """Raise InputError if refined directions of all modules would be larger than a run may hold."""
    count = direction_count(settings)
    size = file_bytes(modules, count, d_model)
    if settings.refine.enabled and size > LARGEST:
        what = "Refined directions" if count == 1 else f"{count} refined directions for each"
        fewer = "give" if count == 1 else "ask for fewer with --set directions.count, or give"
        raise InputError(
            f"{what} of {modules} modules take {size >> 20} MiB, and a run holds at most {LARGEST >> 20}; {fewer} --no-refine."
        )


def with_edit_mode(settings: Settings, note: Callable[[str], None] = lambda text: None) -> Settings:
    """The settings with an edit mode in place of "auto", by what the model's config tells; a note if it isn't least-squares.

    It is full where modules that read are edited, where the inputs of some module can't be captured, as of fused experts, where
    only weights show which modules there are, and where a LoRA is to approximate the edit (that of least-squares is exact).

    Raises:
        InputError: there is no such model, or it can't be edited.
    """
    if settings.edit.mode != AUTO:
        return settings
    skeleton, why = loader.skeleton(settings.model, settings.load, torch.device("cpu")), ""
    if settings.edit.representation == "svd":
        why = "a LoRA of several ranks is to approximate it"
    elif skeleton is None:
        why = "only its weights show what can be edited in this model"
    elif any(target.reads for target in skeleton.targets):
        why = "modules that read are edited"
    elif not (named := _in_table(skeleton)):
        why = "only of modules that the built-in table names is it known whether their inputs can be captured"
    elif _family(skeleton.architecture) in UNCAPTURED or any(is_fused(target.module) for target in named):
        why = "in this model the inputs of some modules can't be captured"  # nor of shared experts, which see positions as one
    if why:
        note(f"the edit mode is full, because {why}")
    mode = "full" if why else "least-squares"
    given, usual = settings.search.max_coeff, SearchSettings().max_coeff
    if not why and given != usual:
        chosen = [f"{name} {low:g} to {high:g}" for name, (low, high) in given.items() if usual.get(name) != (low, high)]
        note(
            f"largest coeffs: {', '.join(chosen)} by search.max_coeff, and otherwise 1 to 8, as of the edit mode "
            "least-squares; if the former were chosen for another mode, such as full, give that one with --set edit.mode"
        )
    return settings.model_copy(update={"edit": settings.edit.model_copy(update={"mode": mode})})


def _in_table(skeleton: loader.Skeleton) -> tuple[Target, ...]:
    """All modules of the model that the built-in table names, if those to edit are among them, else none."""
    architecture = skeleton.architecture
    row = known_architecture(architecture.model_types[0], architecture.layers)
    if row is None or not all(map(is_built_in, architecture.model_types)):
        return ()
    named = tuple(target for target, _ in members(skeleton.model, row))
    return named if {target.name for target in named}.issuperset(target.name for target in skeleton.targets) else ()


def unrefined(settings: Settings) -> str:
    """The note for an edit mode whose front can't be refined."""
    return (
        f"{settings.edit.mode} edits aren't strengths and directions alone, which a gradient could refine, so the run keeps "
        "the search's front; a search alone needs more trials, such as -n 100"
    )


def as_refinable(settings: Settings, note: Callable[[str], None]) -> Settings:
    """The settings without refinement, and a note of it, if the edit mode's front can't be refined."""
    if not settings.refine.enabled or is_refinable(edit_method(settings.edit.mode)):
        return settings
    note(unrefined(settings))
    return settings.model_copy(update={"refine": settings.refine.model_copy(update={"enabled": False})})


def check_names(settings: Settings) -> SelectionRule:
    """Raise InputError for the first unknown name in the settings; returns the rule that `search.select` names."""
    check_several(edit_method(settings.edit.mode), direction_count(settings))
    if settings.directions.protect and is_learned(edit_method(settings.edit.mode)):
        raise InputError(
            f"The edit mode {settings.edit.mode!r} uses no directions, so none can spare capabilities; leave "
            "directions.protect out, or choose another --set edit.mode."
        )
    refinable = is_refinable(edit_method(settings.edit.mode))
    check_kind(settings.export.kind)
    scorers_of(settings, heldout=True)
    scorers = scorers_of(settings)
    rule = parse_rule(settings.search.select, settings.search.select_max_kl, objectives_of(settings, scorers))
    names = [scorer.name for scorer in scorers]
    if rule.scorer and rule.scorer not in names:
        raise InputError(f"The selection {rule.text!r} names no scorer of this run; it has {', '.join(names)}.")
    if settings.search.trials == 0 and not (refinable and settings.refine.enabled):
        remedy = "give more trials with -n, or --refine" if refinable else "give more trials with -n"
        raise InputError(f"A run without trials and without refinement finds nothing; {remedy}.")
    check_packages(settings.search)
    choose_device(settings.device)
    check_push(settings.export)
    check_components(settings)
    return rule


def check_components(settings: Settings) -> None:
    """Raise InputError if `search.max_coeff` has a range for a component that no model has, which would stay unused."""
    built_in = {name for row in ARCHITECTURES.values() for name in row.components}
    if settings.load.readers:
        built_in |= set(READERS)
    if settings.load.separate_kinds:
        built_in |= {name for row in ARCHITECTURES.values() for name in kind_names(row)}
    components = sorted({"default", *built_in, *settings.load.components})
    for name in settings.search.max_coeff:
        if name not in components:
            near = difflib.get_close_matches(name, components, n=1, cutoff=0.3)
            remedy = f"did you mean {near[0]}?" if near else f"choose among {', '.join(components)}."
            raise InputError(f"The setting search.max_coeff names {name!r}, which is no component; {remedy}")
