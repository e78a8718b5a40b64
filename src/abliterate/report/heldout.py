"""The report's section on held-out prompts: base and selected trial side by side, and how optimistic the search was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.report.markup import details, missing, pairs, paragraph, table
from abliterate.report.material import Material

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
