"""The sections of the report, in order: what a run's records say, as HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from abliterate.objectives import UNANSWERED, counted, in_words, other_names, other_scores
from abliterate.report.data import Material, changed_first
from abliterate.report.html import answer, beside, details, escape, glossary, missing, numbers, pairs, paragraph, table
from abliterate.report.plots import best_layer, layer_name
from abliterate.report.refined import fact_pairs, layer_rows, layer_table, refined_table
from abliterate.report.tables import (
    cache_table,
    coeff_table,
    coverage_table,
    disagreement_table,
    export_text,
    full_front_table,
    geometry_table,
    heldout_table,
    importance_table,
    kernel_table,
    progress_table,
    rate_text,
    stage_table,
    trial_table,
    yardstick_table,
)
from abliterate.report.words import reading, used_in
from abliterate.types import Baseline, RefinedParams, Trial, kl_text

NOTHING_HELD_OUT = "Nothing was measured on held-out prompts (abliterate evaluate does it)."
OF_ANOTHER_TRIAL = "The figures on held-out prompts are of another trial than the selected; abliterate evaluate measures it."
_SETS = {"harmful_heldout": "harmful", "harmless_heldout": "harmless", "over_refusal": "harmless that look harmful"}


def heldout(material: Material) -> str:
    """The figures on prompts that neither directions nor search have seen."""
    record = material.heldout
    if not record:
        text = material.missing.get("heldout", NOTHING_HELD_OUT)
        return missing(text) if material.selected else ""
    if record.get("trial") != material.search.selected:
        return missing(OF_ANOTHER_TRIAL)
    try:
        return _section(record, material.search.baseline)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):  # another version's record
        return missing("This version can't read all that was measured on held-out prompts:") + pairs(record, "As it stands")


def in_the_end(material: Material) -> str:
    """The held-out refusals as part of a sentence; empty where they aren't known."""
    record = material.heldout
    try:
        if record["trial"] != material.search.selected:
            return ""
        candidate = record["candidate"]
        answers = f"answers {rate_text(candidate[UNANSWERED]['answered'])} and " if candidate.get(UNANSWERED) else ""
        return f"; on held-out prompts it {answers}refuses {rate_text(candidate['refusals'])}"
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return ""


def _section(record: Mapping[str, Any], baseline: Baseline | None) -> str:
    trial = f"trial {record['trial']}"
    sizes = [f"{prompts['count']} {_SETS.get(name, name)}" for name, prompts in record["prompts"].items()]
    dropped = sum(prompts["dropped"] for prompts in record["prompts"].values())
    left_out = f" {dropped} more were left out, because another set has them, too." if dropped else ""
    text = (
        f"Measured after the search, on prompts that neither directions nor search have seen: {', '.join(sizes)}.{left_out} "
        "In brackets the 95 % interval (Clopper-Pearson). A faulty answer is empty, repetitive, broken off or still thinking. "
        f"{_measured_by_base(record)}"
        "Base answers are the base model's to the harmless prompts; KL and perplexity are per token."
    )
    differences = [_disagreements(judge, trial) for judge in record["judges"]]
    return paragraph(text) + table(heldout_table(record, trial)) + _optimism(record, baseline) + "".join(differences)


def _measured_by_base(record: Mapping[str, Any]) -> str:
    if not record["candidate"].get(UNANSWERED):
        return ""
    return "Answered are prompts whose response is neither a refusal nor, by the base's own measure, broken or off-topic. "


def _optimism(record: Mapping[str, Any], baseline: Baseline | None) -> str:
    """`baseline`: the base model in the search."""
    optimism, share = record["optimism"], baseline.refusals / max(1, baseline.prompts) if baseline else 0.0
    return paragraph(
        f"Optimism, held out less in the search: {100 * optimism['refusals']:+.1f} points of refusals, "
        f"{'+-'[optimism['kl'] < 0]}{kl_text(abs(optimism['kl']))} nats of KL. "
        "Above 0 the search promised too much, if the sets are alike: the base model itself refuses "
        f"{100 * share:.0f} % in the search and {100 * record['base']['refusals']['share']:.0f} % held out."
    )


def _disagreements(judge: Mapping[str, Any], trial: str) -> str:
    """The answers on which a judge and the refusal markers differ."""
    if judge["error"] or not judge["disagreements"]:
        return ""
    summary = f"Answers of {trial} on which {judge['name']} and the refusal markers differ"
    return details(summary, table(disagreement_table(judge)))


# The HTML of the plot of a name, empty where there is no such plot.
Figure = Callable[[str], str]

_SHOWN_ELSEWHERE = {
    *("format", "model", "prompts", "objectives", "baseline", "trials", "front", "selected", "export", "timings", "memory"),
    *("caches", "environment", "coverage", "batch_sizes", "identity", "startup_trials", "directions", "sha256"),
    *("heldout", "response_prefix", "rendering", "yardstick"),
}


def cost(material: Material, figure: Figure) -> str:
    """Time and memory by stage, and the hits of caches."""
    seconds = material.stage_seconds
    if not seconds:
        return ""
    stages = details("As a table", table(stage_table(seconds, material.stage_memory)))
    return beside(figure("times"), figure("memory")) + stages + table(cache_table(material.caches))


def coverage(material: Material) -> str:
    """Which matrices are edited, and why the others aren't."""
    record = material.coverage
    if not record:
        return missing(material.missing.get("coverage", "The file result.json doesn't say which matrices are edited."))
    text = f"{record['share']:.1%} of the parameters that write to the residual stream can be edited."
    if record.get("untold"):
        text = f"What share of the parameters that write to the residual stream can be edited is unknown: {record['untold']}."
    return paragraph(text) + table(coverage_table(record))


def facts(material: Material) -> str:
    """Model, versions, seeds, prompts, export and settings of the run."""
    result, environment = material.result, material.environment
    seeds = {"seed": material.settings.get("seed"), "random trials first": result.get("startup_trials")}
    asked = {"prefix of every response": result.get("response_prefix"), "hash of a prompt as asked": result.get("rendering")}
    machine = {"device": environment.get("device"), "platform": environment.get("platform")}
    settings = (
        details(
            f"All {len(material.settings)} settings", pairs(material.settings, "Settings as resolved; of paths only the name")
        )
        if material.settings
        else missing(material.missing["settings"])
    )
    versions = environment.get("versions", {}) | machine
    return (
        beside(pairs(result["model"], "Model") if result["model"] else "", pairs(versions, "Versions") + pairs(seeds, "Seeds"))
        + details("Prompts", pairs(result.get("prompts", {}) | asked, "Prompt sets"))
        + details("Export and its check", pairs(result["export"], "Export"))
        + details("Batch sizes", pairs(result.get("batch_sizes", {}), "Prompts at a time"))
        + details("What the trials depend on", pairs(result.get("identity", {}), "Hashes and names"))
        + settings
    )


def further(material: Material) -> str:
    """Everything else in the result, which is shown plainly rather than left out."""
    others = {name: value for name, value in material.result.items() if name not in _SHOWN_ELSEWHERE and value}
    return "".join(pairs(value if isinstance(value, dict) else {name: value}, name) for name, value in others.items())


def sections(material: Material, figure: Figure) -> list[tuple[str, str, str]]:
    """(id, title, HTML) of every section that has something to say."""
    made = [
        ("front", "Front", _front(material, figure)),
        ("progress", "Progress of the search", _progress(material, figure)),
        ("kernels", "The selected trial", _kernels(material, figure)),
        ("importance", "Parameter importance", _importance(material, figure)),
        ("geometry", "How the residuals lie", _geometry(material, figure)),
        ("heldout", "On held-out prompts", heldout(material)),
        ("answers", "Answers before and after", _answers(material)),
        ("cost", "Where time and memory went", cost(material, figure)),
        ("coverage", "Coverage", coverage(material)),
        ("facts", "Settings, versions, seeds", facts(material)),
        ("further", "Further results", further(material)),
    ]
    words = used_in(" ".join(html for _, _, html in made) + summary(material))
    made.append(("words", "Words used here", details("What the words of this page mean", glossary(words))))
    return [section for section in made if section[2]]


def in_a_sentence(material: Material) -> str:
    """The result of the run in one sentence."""
    base, chosen = material.search.baseline, material.selected
    if not material.trials or base is None:
        return "No trial has finished yet" + ("." if material.unfinished else "; make the report again when some have.")
    text = f"The base model refuses {base.refusals} of {base.prompts} harmful evaluation prompts"
    if chosen:
        how = ", refined by gradient," if isinstance(chosen.params, RefinedParams) else ""
        text += (
            f"; trial {chosen.number}{how} refuses {chosen.refusals}{_left_open(chosen)}, at a mean first-token KL of "
            f"{kl_text(chosen.kl)} on harmless ones"
        )
        text += "".join(f"; {score}" for score in other_scores(chosen, base.values)) + in_the_end(material)
    return text + "."


def _left_open(trial: Trial) -> str:
    """How many prompts a trial leaves unanswered, as part of a sentence."""
    kinds = trial.scores.get(UNANSWERED, {})
    if "broken" not in kinds:
        return ""
    return f" and leaves {kinds['count']} unanswered ({kinds['broken']} broken, {kinds['off_topic']} off-topic answers)"


def summary(material: Material) -> str:
    """The same sentence, and a few numbers."""
    base, chosen = material.search.baseline, material.selected
    if base is None or not base.prompts:
        return missing(in_a_sentence(material))
    before, front = f"{base.refusals}/{base.prompts}", len(material.search.front)
    facts = {"refusals": before, "trials": str(len(material.trials)), "on the front": str(front)}
    if chosen:
        facts["refusals"] = f"{before} → {chosen.refusals}/{base.prompts}"
        if UNANSWERED in chosen.scores and base.unanswered is not None:
            facts["unanswered"] = f"{base.unanswered['count']} → {chosen.unanswered}/{base.prompts}"
        kl = chosen.scores["kl"]
        facts |= {"KL mean": kl_text(kl["mean"]), "KL max": kl_text(kl["max"]), "selected": f"trial {chosen.number}"}
        for name in other_names(chosen.values):
            first = f"{base.values[name]:.4g} → " if name in base.values else ""
            facts[name] = f"{first}{chosen.values[name]:.4g}"
    if material.progress:
        facts["hypervolume"] = f"{material.progress[-1]['hypervolume']:.4f}"
    export = material.result["export"]
    other = export.get("trial") not in (None, chosen.number if chosen else None)  # an earlier session's
    whose = f" of trial {export['trial']}" if other else ""
    facts["export"] = f"{export['kind']}{whose}, {export_text(export)}" if export.get("path") else "none"
    return paragraph(in_a_sentence(material)) + numbers(facts)


def _front(material: Material, figure: Figure) -> str:
    base = material.search.baseline
    if not material.trials or base is None:
        return ""
    counts = {state: sum(trial.state == state for trial in material.trials) for state in ("complete", "stopped", "failed")}
    axes = (
        "Both axes are better towards the lower left. KL says how far the edited model's next-token probabilities are from the "
        "base model's on harmless prompts; 0 is no change. Its axis is logarithmic above 0.001 and linear below."
    )
    if not counted(material.objectives):
        of_base = ", ".join(f"{objective.name} {base.value(objective.name):.4g}" for objective in material.objectives)
        shown = {1: "it by trial", 2: "both"}.get(len(material.objectives), "the first two")
        axes = f"For {in_words(material.objectives)}; the plot shows {shown}, the table all. The base model has {of_base}."
    ended = (
        "A stopped trial was ended once it was certain that it can't reach the front (pruned); its counts are lower bounds. "
    )
    text = (
        f"{axes} The front has the trials that no other trial beats in all objectives. {ended if counts['stopped'] else ''}"
        f"Trials: {counts['complete']} complete, {counts['stopped']} stopped, {counts['failed']} failed."
    )
    title = f"All {len(material.trials)} trials"
    everything = details(title, table(trial_table(material.search, material.trials, title)))
    return (
        paragraph(text)
        + figure("front")
        + table(full_front_table(material.search).without(("state",)))
        + everything
        + _yardstick(material)
    )


def _yardstick(material: Material) -> str:
    """How answers are told from broken and off-topic ones, with the bounds and their distribution."""
    record = material.result.get("yardstick")
    if not record:
        return ""
    text = (
        f"A response counts as answered if it is no refusal and keeps these bounds. They come from {record['answers']} answers "
        "that the base model gave to harmless prompts, sampled at temperature 1, and are measured by its own probabilities."
    )
    return details("How answers are judged", paragraph(text) + table(yardstick_table(record)))


def _progress(material: Material, figure: Figure) -> str:
    if not material.progress:
        return ""
    meaning = (
        "The hypervolume is the area that the front gains of the square up to a KL of 1 and all prompts "
        f"{counted(material.objectives).replace('refusals', 'refused')}; 1 would be none at no KL."
    )
    if not counted(material.objectives):
        meaning = (
            "The hypervolume is the share that the front gains of the box between the best and the worst value of each "
            "objective in this search, the base model's among them; searches can't be compared by it."
        )
    text = f"{meaning} Time is the trials' own seconds, added up."
    as_table = details("As a table", table(progress_table(material.progress)))
    return paragraph(text) + beside(figure("progress"), figure("progress-in-time")) + as_table


def _kernels(material: Material, figure: Figure) -> str:
    trial = material.selected
    if trial is None:
        return missing("No trial has been selected yet.") if material.trials else ""
    params = trial.params
    if isinstance(params, RefinedParams):
        return _refined(material, trial, params, figure)
    said = reading(material.edit_mode)
    where = (
        f"One direction for all layers, that of layer {params.direction_index:.2f} (the dashed line)."
        if params.scope == "global"
        else "Each layer loses its own direction."
    )
    if not said.directed:
        where = "The edit uses no direction."
    text = (
        f"Trial {trial.number}. {where} A module's coeff λ {said.sentence}; its kernel is the range of layers where λ isn't 0."
    )
    if params.directions > 1:
        text += f" There are {params.directions} directions, and for each of them λ is multiplied by its weight."
    by_layer = details("Coeffs by layer", table(coeff_table(trial, material.n_layers)))
    return paragraph(text) + beside(figure("kernels"), table(kernel_table(trial, material.edit_mode)) + by_layer)


def _refined(material: Material, trial: Trial, params: RefinedParams, figure: Figure) -> str:
    text = (
        f"Trial {trial.number}. Its coeffs λ and its directions were learned by gradient from training prompts, which the "
        "scores above don't use: each module has a coeff and a direction of its own. The cosine says how far a direction has "
        "turned from the one it started with; 1 is not at all."
    )
    if params.directions > 1:
        text += (
            f" There are {params.directions} directions a module, for each of which λ is multiplied by its own learned weight; "
            "the cosine is that of all of them together, each counting by its weight."
        )
    rows = layer_rows(params, material.coverage)
    by_layer = details("By layer", table(layer_table(rows)))
    found = pairs(dict(fact_pairs(params)), "How it was found")
    plots = beside(figure("strengths"), figure("turns"))
    return paragraph(text) + plots + beside(table(refined_table(trial, rows)) + by_layer, found)


def _importance(material: Material, figure: Figure) -> str:
    if not material.importance:
        return missing(material.missing["importance"]) if material.trials else ""
    text = (
        "How much each parameter tells the best tenth of the trials from all of them, by Optuna's PED-ANOVA on the "
        "scores that the sampler got (of stopped trials the bound). It describes this search; with few trials it is rough."
    )
    return paragraph(text) + figure("importance") + details("As a table", table(importance_table(material.importance)))


def _geometry(material: Material, figure: Figure) -> str:
    geometry = material.geometry
    if geometry is None:
        return missing(material.missing["geometry"])
    text = (
        "Residuals are the outputs of each layer at the last prompt position (emb.: the input of layer 0), of the prompts that "
        "the directions were found with. "
    )
    parts = [figure("norms"), figure("cosines")]
    below = ""
    if geometry["projection"]:
        sampled = " and ".join(f"{count} {name}" for name, count in geometry["sampled"].items())
        text += (
            f"Separation and projection are of {sampled} prompts. The probe is a ridge regression tested on the prompt that it "
            "was fitted without: 0.5 is guessing. The silhouette is above 0 where points are closer to their own set than to "
            "the other."
        )
        parts += [figure("separation"), _slider(material) + figure("projection")]
    else:
        below = missing(geometry["reason"])
    return paragraph(text) + beside(*parts) + below + details("As a table", table(geometry_table(geometry)))


def _slider(material: Material) -> str:
    assert material.geometry is not None
    last, start = len(material.geometry["projection"]) - 1, best_layer(material)
    return (
        f'<div class="slider" hidden><label for="layer">Layer</label>'
        f'<input type="range" id="layer" min="0" max="{last}" step="1" value="{start}">'
        f'<output id="layer-shown" for="layer">{escape(layer_text(material, start))}</output></div>'
        "<noscript><p>With JavaScript a slider shows every layer; this is the layer where the sets are the farthest apart.</p>"
        "</noscript>"
    )


def layer_text(material: Material, index: int) -> str:
    """A layer of the projection in words."""
    assert material.geometry is not None
    row, shares = material.geometry["layers"][index], material.geometry["projection"][index]["explained"]
    if row.get("probe") is None or row.get("silhouette") is None:
        return f"{layer_name(index)}: all points are the same"
    return f"{layer_name(index)}: axes explain {sum(shares):.0%}, probe {row['probe']:.0%}, silhouette {row['silhouette']:.2f}"


def _answers(material: Material) -> str:
    answers = material.answers
    if answers is None:
        return missing(material.missing["answers"]) if material.selected else ""
    text = (
        f"Some of the evaluation prompts, answered by the base model and by trial {answers['trial']}, greedily and in at most "
        f"{answers['max_new_tokens']} tokens. Refusal markers are highlighted."
    )
    parts = [paragraph(text)]
    for name in ("harmful", "harmless"):
        parts.append(f"<h3>{name.capitalize()} prompts</h3>")
        for row in changed_first(answers[name]):
            both = answer("base model", row["base"]) + answer(f"trial {answers['trial']}", row["edited"])
            parts.append(f'<article><h4>{escape(row["prompt"])}</h4><div class="pair">{both}</div></article>')
    return "".join(parts)
