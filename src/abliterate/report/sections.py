"""The sections of the report, in order: what a run's records say, as HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from abliterate.objectives import DEFAULT, KL, in_words, other_names, other_scores
from abliterate.report.data import Material
from abliterate.report.html import answer, details, escape, missing, numbers, pairs, paragraph, table
from abliterate.report.plots import best_layer, kernel_text, layer_name
from abliterate.types import Baseline, Trial

_SETS = {"harmful_heldout": "harmful", "harmless_heldout": "harmless", "over_refusal": "harmless that look harmful"}

_RATES = {
    "refusals": "refusals",
    "answered": "answered (no refusal, no fault)",
    "harmless_refusals": "refusals of harmless prompts",
    "over_refusals": "refusals of harmless that look harmful",
}


def heldout(material: Material) -> str:
    """What was measured on prompts that neither directions nor search have seen."""
    record = material.result.get("heldout")
    if not record:
        return missing("Nothing was measured on held-out prompts (abliterate evaluate does it).") if material.selected else ""
    if record.get("trial") != material.result["selected"]:
        return missing(
            "What was measured on held-out prompts is of another trial than the selected; abliterate evaluate does it."
        )
    try:
        return _of(record, f"trial {record['trial']}", material.result["baseline"])
    except (AttributeError, KeyError, TypeError, ValueError):  # another version's
        return missing("This version can't read all that was measured on held-out prompts:") + pairs(record, "As it stands")


def in_the_end(material: Material) -> str:
    """The same, as part of a sentence; empty where it isn't known."""
    record = material.result.get("heldout") or {}
    try:
        of_selected = record["trial"] == material.result["selected"]
        return f"; on held-out prompts it refuses {rate_text(record['candidate']['refusals'])}" if of_selected else ""
    except (KeyError, TypeError, ValueError):
        return ""


def rate_text(rate: Mapping[str, Any]) -> str:
    """`3 of 100 (0.6–8.5 %)`, the 95 % interval."""
    return f"{rate['count']} of {rate['prompts']} ({100 * rate['low']:.1f}–{100 * rate['high']:.1f} %)"


def _of(record: Mapping[str, Any], trial: str, before: Mapping[str, Any]) -> str:
    base, found, search = record["base"], record["candidate"], record["search"]
    sizes = [f"{part['count']} {_SETS.get(name, name)}" for name, part in record["prompts"].items()]
    dropped = sum(part["dropped"] for part in record["prompts"].values())
    left_out = f" {dropped} more were left out: another set has them, too." if dropped else ""
    text = (
        f"Measured after the search, on prompts that neither directions nor search have seen: {', '.join(sizes)}.{left_out} "
        "In brackets the 95 % interval (Clopper-Pearson)."
    )
    rows = [
        (title, rate_text(base[name]), rate_text(found[name]), rate_text(search[name]) if name in search else "")
        for name, title in _RATES.items()
        if base[name]
    ]
    faults = [(name.replace("_", " "), base["faults"][name], count, "") for name, count in found["faults"].items()]
    head = ("", "base model", trial, "in the search")
    parts = [
        paragraph(text),
        table(head, [*rows, *faults], "Answers", words=(0,)),
        _drift(record, trial),
        _optimism(record, before),
    ]
    if record["scores"]:
        scores = [(name, *_shown(one)) for name, one in record["scores"].items()]
        parts.append(table(("", "base model", trial), scores, "Other scorers", words=(0,)))
    return "".join([*parts, *(_judge(one, trial) for one in record["judges"])])


def _shown(score: Mapping[str, Any]) -> tuple[str, str]:
    """A scorer's values of both models, or why there are none."""
    if score["error"]:
        return "none", score["error"]
    return f"{score['values']['base']:.4g}", f"{score['values']['candidate']:.4g}"


def _drift(record: Mapping[str, Any], trial: str) -> str:
    """On harmless prompts."""
    search, perplexity, same = record["search"], record["perplexity"], record["unchanged"]
    rows = [
        (f"KL of the first token, {name}", f"{record['kl'][name]:.4f}", f"{search['kl'][name]:.4f}")
        for name in ("mean", "median", "max")
    ]
    answers = record["kl_answers"]
    rows += [(f"KL over the base's answers, {name} a token", f"{answers[name]:.4f}", "") for name in ("mean", "median", "max")]
    rows.append(("perplexity of the base's answers", f"{perplexity['candidate']:.4f} (base {perplexity['base']:.4f})", ""))
    rows.append(("answers the same as the base's", rate_text(same), ""))
    if same["first_difference"] is not None:
        rows.append(("the others differ from token", f"{same['first_difference']:.1f} on (mean)", ""))
    return table(("", trial, "in the search"), rows, "Drift from the base on harmless prompts; KL in nats", words=(0,))


def _optimism(record: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """`before`: the base model in the search."""
    optimism, share = record["optimism"], before["refusals"] / max(1, before["prompts"])
    return paragraph(
        f"Optimism, held out less in the search: {100 * optimism['refusals']:+.1f} points of refusals, {optimism['kl']:+.4f} "
        "nats of KL. Above 0 the search promised too much, if the sets are alike: the base model itself refuses "
        f"{100 * share:.0f} % in the search and {100 * record['base']['refusals']['share']:.0f} % held out."
    )


def _judge(judge: Mapping[str, Any], trial: str) -> str:
    """What a judge says, and where the refusal markers say something else."""
    if judge["error"]:
        return missing(f"{judge['name']} gives no verdicts: {judge['error']}")
    differ = judge["disagreements"]
    text = (
        f"The judge {judge['name']} sees refusals in {rate_text(judge['base'])} of the base model's answers and in "
        f"{rate_text(judge['candidate'])} of {trial}'s; of these, {len(differ)} unlike the refusal markers."
    )
    says = {True: "refusal", False: "no refusal"}
    rows = [(one["prompt"], one["response"], says[one["judge"]], says[one["markers"]]) for one in differ]
    head = ("prompt", "response", "judge", "markers")
    listed = details("Where they differ", table(head, rows, "Judge against markers", texts=(0, 1, 2, 3))) if rows else ""
    return paragraph(text) + listed


# A plot's place: its HTML by name, empty where there is none.
Figure = Callable[[str], str]

_SHOWN_ELSEWHERE = {
    *("format", "model", "prompts", "objectives", "baseline", "trials", "front", "selected", "export", "timings", "memory"),
    *("caches", "environment", "coverage", "batch_sizes", "identity", "startup_trials", "directions", "sha256"),
    *("heldout", "response_prefix", "rendering"),
}


def cost(material: Material, figure: Figure) -> str:
    """Time and memory by stage, and what caches did."""
    result = material.result
    spent = material.stages(result["timings"])
    if not spent:
        return ""
    peaks = material.stages(result["memory"].get("stages", {}))
    rows = [
        (name, f"{seconds:.1f}", *(_gib(peaks.get(name, {}).get(f"peak_{place}_bytes")) for place in ("rss", "device")))
        for name, seconds in spent.items()
    ]
    rows.append(("all", f"{sum(spent.values()):.1f}", "", ""))
    head = ("stage", "seconds", "peak of main memory, GiB", "peak on the device, GiB")
    caches = [(name, count["hits"], count["misses"]) for name, count in result["caches"].items()]
    return (
        figure("times")
        + figure("memory")
        + details("As a table", table(head, rows, "Before this report was written"))
        + table(("cache", "hits", "misses"), caches, "Caches")
    )


def _gib(value: int | None) -> str:
    return f"{value / 2**30:.3f}" if value else "—"


def coverage(material: Material) -> str:
    """What of the model is edited, what not and why."""
    found = material.result.get("coverage")
    if not found:
        return missing("This run says nothing of what was edited: it was made by an earlier version.")
    text = f"{found['share']:.1%} of the parameters that write to the residual stream can be edited."
    rows = [
        (
            group["component"],
            group["path"],
            group["layers"],
            group["matrices"],
            " × ".join(map(str, group["shape"])) if group["shape"] else "?",
            f"{group['parameters']:,}",
            "yes" if group["edited"] else f"no: {group['left_out']}",
        )
        for group in found["groups"]
    ]
    head = ("component", "module", "layers", "matrices", "d_out × d_in", "parameters", "edited")
    untold = paragraph(f"How much this is can't be told: {found['untold']}.") if found.get("untold") else ""
    return paragraph(text) + table(head, rows, "What writes to the residual stream", texts=(1, 6)) + untold


def facts(material: Material) -> str:
    """What the run was: model, versions, seeds, prompts, export, settings."""
    result = material.result
    environment = result.get("environment", {})
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
    return (
        pairs(result["model"], "Model")
        + pairs(environment.get("versions", {}) | machine, "Versions")
        + pairs(seeds, "Seeds")
        + details("Prompts", pairs(result.get("prompts", {}) | asked, "Prompt sets"))
        + details("Export and its check", pairs(result["export"], "Export"))
        + details("Batch sizes", pairs(result.get("batch_sizes", {}), "Prompts at a time"))
        + details("What the trials depend on", pairs(result.get("identity", {}), "Hashes and names"))
        + settings
    )


def further(material: Material) -> str:
    """Whatever else is in the result: shown plainly rather than left out."""
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
    return [one for one in made if one[2]]


def in_a_sentence(material: Material) -> str:
    """What was found."""
    if not material.trials:
        return "No trial has finished yet; make the report again when some have."
    chosen, total = material.selected, material.prompts
    text = f"The base model refuses {material.result['baseline']['refusals']} of {total} harmful evaluation prompts"
    if chosen:
        kl = chosen.scores["kl"]["mean"]
        text += f"; trial {chosen.number} refuses {chosen.refusals}, at a mean first-token KL of {kl:.4f} on harmless ones"
        before = material.result["baseline"].get("values", {})
        text += "".join(f"; {said}" for said in other_scores(chosen, before)) + in_the_end(material)
    return text + "."


def summary(material: Material) -> str:
    """The same, and a few numbers."""
    result, chosen = material.result, material.selected
    if not material.prompts:
        return missing(in_a_sentence(material))
    before, total = result["baseline"]["refusals"], material.prompts
    facts = {"refusals": f"{before} of {total}", "trials": str(len(material.trials)), "on the front": str(len(result["front"]))}
    if chosen:
        kl = chosen.scores["kl"]
        facts["refusals"] = f"{before} → {chosen.refusals} of {total}"
        facts |= {"KL mean": f"{kl['mean']:.4f}", "KL max": f"{kl['max']:.4f}", "selected": f"trial {chosen.number}"}
        base = result["baseline"].get("values", {})
        for name in other_names(chosen.values):
            facts[name] = (f"{base[name]:.4g} → " if name in base else "") + f"{chosen.values[name]:.4g}"
    if material.progress:
        facts["hypervolume"] = f"{material.progress[-1]['hypervolume']:.3f}"
    verified = {True: "verified", False: "FAILED its check", None: "not checked"}[result["export"].get("verified")]
    facts["export"] = f"{result['export']['kind']}, {verified}" if result["export"].get("path") else "none"
    return paragraph(in_a_sentence(material)) + numbers(facts)


def _front(material: Material, figure: Figure) -> str:
    if not material.trials:
        return ""
    front = front_of(material)
    counts = {state: sum(trial.state == state for trial in material.trials) for state in ("complete", "stopped", "failed")}
    axes = "Both axes are better towards the lower left."
    if material.objectives != DEFAULT:
        base = Baseline.from_record(material.result["baseline"])
        of_base = ", ".join(f"{one.name} {base.value(one.name):.4g}" for one in material.objectives)
        shown = {1: "it by trial", 2: "both"}.get(len(material.objectives), "the first two")
        axes = f"For {in_words(material.objectives)}; the plot shows {shown}, the table all. The base model has {of_base}."
    ended = "A stopped trial was ended once it was certain that it can't reach the front; its refusals are a lower bound. "
    text = (
        f"{axes} {ended if counts['stopped'] else ''}"
        f"{counts['complete']} trials are complete, {counts['stopped']} were stopped and {counts['failed']} failed."
    )
    everything = details(f"All {len(material.trials)} trials", _trials(material, material.trials, "All trials"))
    return paragraph(text) + figure("front") + _trials(material, front, f"The front, {front_order(material)}") + everything


def front_of(material: Material) -> list[Trial]:
    """The trials on the front, the best in the first objective first."""
    front = [trial for trial in material.trials if material.is_front(trial)]
    first = material.objectives[0]
    return sorted(front, key=lambda trial: first.cost(trial.value(first.name)))


def front_order(material: Material) -> str:
    """How `front_of` sorts, in words."""
    first = material.objectives[0]
    name = "KL" if first.name == KL else first.name
    return f"by {'rising' if first.goal == 'minimize' else 'falling'} {name}"


def _trials(material: Material, trials: Sequence[Trial], caption: str) -> str:
    components = list(dict.fromkeys(name for trial in material.trials for name in trial.params.kernels))
    others = material.others
    head = ("trial", "state", "refusals", "KL mean", "KL median", "KL max", *others, "seconds", "scope", "direction")
    rows: list[tuple[Any, ...]] = []
    for trial in trials:
        scores = trial.scores
        bound = "≥ " if trial.state == "stopped" else ""
        kl = [f"{scores['kl'][name]:.4f}" for name in ("mean", "median", "max")] if "kl" in scores else ["", "", ""]
        refusals = f"{bound}{scores['refusals']}" if "refusals" in scores else ""
        direction = f"{trial.params.direction_index:.2f}" if trial.params.scope == "global" else ""
        kernels = [kernel_text(trial.params.kernels[name]) if name in trial.params.kernels else "" for name in components]
        own = [trial.number, trial.state, refusals, *kl, *(_other(trial, name) for name in others), f"{trial.seconds:.1f}"]
        rows.append((*own, trial.params.scope, direction, *kernels, trial.reason))
    reason = ("reason",) if any(trial.reason for trial in trials) else ()
    width = len(head) + len(components) + len(reason)
    chosen = {place for place, trial in enumerate(trials) if trial.number == material.result["selected"]}
    rows = [row[:width] for row in rows]
    words = (1, len(head) - 2, *range(len(head), len(head) + len(components)))
    texts = (width - 1,) if reason else ()
    return table((*head, *components, *reason), rows, caption, marked=chosen, words=words, texts=texts)


def _other(trial: Trial, name: str) -> str:
    if name in trial.values:
        return f"{trial.values[name]:.4g}"
    return str(trial.scores.get(name, ""))


def _progress(material: Material, figure: Figure) -> str:
    if not material.progress:
        return ""
    what = (
        "The hypervolume is the area that the front gains of the square up to a KL of 1 and all prompts refused; 1 would be no "
        "refusals at no KL."
    )
    if material.objectives != DEFAULT:
        what = (
            "The hypervolume is what the front gains of the box between the best and the worst value of each objective in this "
            "search, the base model's among them; searches can't be compared by it."
        )
    text = f"{what} Time is what the trials took, added up."
    step = max(1, len(material.progress) // 20)
    kept = [row for place, row in enumerate(material.progress) if not (len(material.progress) - 1 - place) % step]
    rows = [(row["trial"], f"{row['seconds']:.1f}", f"{row['hypervolume']:.4f}") for row in kept]
    numbers_ = details("As a table", table(("trials", "seconds", "hypervolume"), rows, "Hypervolume so far"))
    return paragraph(text) + figure("progress") + figure("progress-in-time") + numbers_


def _kernels(material: Material, figure: Figure) -> str:
    trial = material.selected
    if trial is None:
        return missing("No trial has been selected yet.") if material.trials else ""
    where = (
        f"One direction for all layers, that of layer {trial.params.direction_index:.2f} (the dashed line)."
        if trial.params.scope == "global"
        else "Each layer loses its own direction."
    )
    text = (
        f"Trial {trial.number}. {where} A module's coeff λ says how much of the direction it loses; outside its kernel it is "
        "untouched."
    )
    n_layers = int(material.result["model"]["n_layers"])
    kernels = trial.params.kernels
    rows = [(layer, *(f"{kernel.coeff(layer):.3f}" for kernel in kernels.values())) for layer in range(n_layers)]
    params = table(("component", "kernel"), [(name, kernel_text(one)) for name, one in kernels.items()], "Kernels", texts=(1,))
    return (
        paragraph(text) + figure("kernels") + params + details("Coeffs by layer", table(("layer", *kernels), rows, "Coeff λ"))
    )


def _importance(material: Material, figure: Figure) -> str:
    if not material.importance:
        return missing(material.missing["importance"]) if material.trials else ""
    text = (
        "How much each parameter tells the best tenth of the trials from all of them, by Optuna's PED-ANOVA on what the "
        "sampler was told (of stopped trials the bound). It describes this search; with few trials it is rough."
    )
    names = list(dict.fromkeys(name for shares in material.importance.values() for name in shares))
    rows = [(name, *(f"{shares.get(name, 0):.1%}" for shares in material.importance.values())) for name in names]
    return (
        paragraph(text)
        + figure("importance")
        + details("As a table", table(("parameter", *material.importance), rows, "Shares"))
    )


def _geometry(material: Material, figure: Figure) -> str:
    geometry = material.geometry
    if geometry is None:
        return missing(material.missing["geometry"])
    text = (
        "Residuals are the outputs of each layer at the last prompt position (emb.: what enters layer 0), of the prompts that "
        "the directions were found with. "
    )
    parts = [figure("norms"), figure("cosines")]
    if geometry["projection"]:
        sampled = " and ".join(f"{count} {name}" for name, count in geometry["sampled"].items())
        text += (
            f"Separation and projection are of {sampled} prompts. The probe is a ridge regression tested on the prompt that it "
            "was fitted without: 0.5 is guessing. The silhouette is above 0 where points are closer to their own set than to "
            "the other."
        )
        parts += [figure("separation"), "<h3>Projection on two principal axes</h3>", _slider(material), figure("projection")]
    else:
        parts.append(missing(geometry["reason"]))
    columns = {
        "norm_harmful": "‖harmful‖",
        "norm_harmless": "‖harmless‖",
        "norm_difference": "‖difference‖",
        "cos_means": "cos(harmful, harmless)",
        "cos_harmful_direction": "cos(harmful, direction)",
        "cos_harmless_direction": "cos(harmless, direction)",
    }
    if geometry["projection"]:
        columns |= {"silhouette": "silhouette", "probe": "probe"}
    rows = [
        (row["index"] - 1 if row["index"] else "emb.", *(number_text(row.get(name)) for name in columns))
        for row in geometry["layers"]
    ]
    parts.append(details("As a table", table(("layer", *columns.values()), rows, "Means (‖·‖: norms) and separation by layer")))
    return paragraph(text) + "".join(parts)


def _slider(material: Material) -> str:
    assert material.geometry is not None
    last, start = len(material.geometry["projection"]) - 1, best_layer(material)
    return (
        f'<div class="slider" hidden><label for="layer">Layer</label>'
        f'<input type="range" id="layer" min="0" max="{last}" step="1" value="{start}">'
        f'<output id="layer-shown" for="layer">{escape(layer_text(material, start))}</output></div>'
        "<noscript><p>With JavaScript a slider shows every layer; this is the one at which the sets are the farthest apart.</p>"
        "</noscript>"
    )


def layer_text(material: Material, index: int) -> str:
    """One layer of the projection in words."""
    assert material.geometry is not None
    row, shares = material.geometry["layers"][index], material.geometry["projection"][index]["explained"]
    if row.get("probe") is None:
        return f"{layer_name(index)}: all points are the same"
    return f"{layer_name(index)}: axes explain {sum(shares):.0%}, probe {row['probe']:.0%}, silhouette {row['silhouette']:.2f}"


def number_text(value: float | None) -> str:
    """Three digits behind the point of small numbers, fewer of large ones; what rounds to nothing has no sign."""
    if value is None:
        return "—"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 0
    return f"{value:.{digits}f}".replace("-0.000", "0.000")


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
        for row in answers[name]:
            both = answer("base model", row["base"]) + answer(f"trial {answers['trial']}", row["edited"])
            parts.append(f'<article><h4>{escape(row["prompt"])}</h4><div class="pair">{both}</div></article>')
    return "".join(parts)
