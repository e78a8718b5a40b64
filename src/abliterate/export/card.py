"""The model card: plainly what was done to which model, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abliterate import __version__
from abliterate.export.recipe import code, plain
from abliterate.objectives import DEFAULT
from abliterate.types import Trial

_CARD = """\
---
{base_model}tags:
{tags}
---

# {base}, {title}

This is {base}{revision} after directional ablation: the direction along which the model separates {separated} \
was removed from matrices that write to the residual stream. No training took place.{dequantized}

{altered} Whoever runs or passes on this model answers for what it is used for.

| | base | this model |
|---|---|---|
| refusals ({n_harmful} harmful prompts, marker count) | {before} | {after} |
| KL(base‖this), first token, {n_harmless}harmless prompts | 0 | mean {mean:.4f}, median {median:.4f}, max {max:.4f} |
{others}
The scores are those of the prompts that the search optimized over, so they are optimistic; a marker count is not a
judgement of the answers' quality or safety.
{heldout}
Edit `{mode}` ({representation}{approximation}), direction method `{method}`; trial {number} of a search with seed {seed}{over},
made with abliterate {version}. Parameters:

```json
{params}
```
{recipe}"""

# Where it refuses fewer of the harmful prompts than the base, and where it doesn't.
_LESS = {
    "tags": "- abliterated\n- abliterate",
    "title": "with refusal ablated",
    "separated": "prompts it refuses\nfrom prompts it answers",
    "altered": "**Its safety behaviour was altered on purpose.** It refuses less than the base model, also where the base\n"
    "model was right to refuse.",
}
_NOT_LESS = {
    "tags": "- abliterate",
    "title": "with a direction ablated",
    "separated": "one set of prompts\n(called harmful) from another (called harmless)",
    "altered": "**Its behaviour was altered on purpose**, by a search over {named}. Of the harmful prompts\n"
    "below it refuses {compared} the base model does.",
}
_HELDOUT = """
## On prompts that were held out

Neither directions nor the search saw these prompts ({sources}). In brackets: 95 % confidence (Clopper-Pearson).

| | base | this model | this model, in the search |
|---|---|---|---|
| refusals | {base[refusals]} | {candidate[refusals]} | {search[refusals]} |
| answered: no refusal, empty, repetitive or broken off | {base[answered]} | {candidate[answered]} | |
{over}| harmless answers the same, word by word | | {unchanged} | |
| KL(base‖this), first token, mean | 0 | {kl[mean]:.4f} | {search_kl[mean]:.4f} |
| KL(base‖this) along the base's answers, mean of {kl_answers[tokens]} tokens | 0 | {kl_answers[mean]:.4f} | |
| perplexity of the base's answers | {perplexity[base]:.3f} | {perplexity[candidate]:.3f} | |
"""
_OVER = "| refusals of harmless prompts that look harmful | {} | {} | |\n"
_CHECKED = """
## Checked after reloading

{verdict}

{figures}
"""
_SCORES = """\
| | trial | this export, reloaded |
|---|---|---|
| refusals of {prompts} harmful prompts | {refusals} | {found_refusals} |
| KL(base‖edited), first token, mean | {kl:.4f} | {found_kl:.4f} |

KL(trial‖export) of the first token: {divergences}. Largest error of one module's edit: {module}."""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card's text; `facts` has the names in the template, `params` and `kl` as JSON-able values.

    `n_harmless`: None where a run of an earlier version didn't record it. `on_hub`: whether `base` is a name there.
    `quantized`: how the base's files are, or ""; `dense`: whether this export has weights of its own.
    `objectives`: where they aren't the usual two; `before_values`, `values`: of further scorers, of base and trial.
    `approximation` {"mean", "max"}: what a low-rank representation loses of each matrix's change; empty for exact ones.
    """
    name = " ".join(str(facts["base"]).split())
    facts = {**facts, "base": plain(name)}  # a directory's name may hold anything
    revision = f" (revision {plain(facts['revision'])})" if facts["revision"] else ""
    params = json.dumps(facts["params"], indent=1)
    lost = facts["approximation"]
    approximation = (
        f", which misses {lost['mean']:.1%} of a matrix's change on average, {lost['max']:.1%} at most" if lost else ""
    )
    dequantized = ""
    if facts.get("quantized") and facts["dense"]:
        stored = facts["quantized"]
        dequantized = (
            f"\n\nThe base's weights are quantized ({stored}). This model is **dequantized**: all its weights are dense."
        )
    named = ", ".join(f"{code(one.name)} ({one.goal}d)" for one in facts["objectives"])
    base_values = facts["before_values"]
    texts = _said(facts["before"], facts["after"], named) | {
        "over": f" over {named}" if tuple(facts["objectives"]) != DEFAULT else "",
        "others": "".join(
            f"| {code(name)} | {f'{base_values[name]:.4g}' if name in base_values else ''} | {value:.4g} |\n"
            for name, value in facts["values"].items()
        ),
        "dequantized": dequantized,
        "heldout": _heldout(facts.get("heldout")),
        "base_model": f"base_model: {name}\n" if facts["on_hub"] else "",
        "n_harmless": f"{facts['n_harmless']} " if facts["n_harmless"] else "",
        "revision": revision,
        "params": params,
        "approximation": approximation,
        "version": __version__,
    }
    return _CARD.format(**{**facts, **facts["kl"], **texts})


def _said(before: int, after: int, named: str) -> dict[str, str]:
    """What the card says of refusals, by `before` and `after`: objectives may ask for something else than fewer."""
    if after < before:
        return _LESS
    compared = "as many as" if after == before else "more than"
    return _NOT_LESS | {"altered": _NOT_LESS["altered"].format(named=named, compared=compared)}


def _heldout(record: Mapping[str, Any] | None) -> str:
    """The section on held-out prompts, of the record in `result.json`; nothing where there is none."""
    if not record:
        return ""
    sides = {name: {score: _rate(record[name][score]) for score in ("refusals", "answered")} for name in ("base", "candidate")}
    over = [record[name]["over_refusals"] for name in ("base", "candidate")]
    sources = "; ".join(f"{one['count']} of {plain(one['source'])}" for one in record["prompts"].values())
    return _HELDOUT.format(
        **sides,
        sources=sources,
        search={"refusals": _rate(record["search"]["refusals"])},
        search_kl=record["search"]["kl"],
        over=_OVER.format(*map(_rate, over)) if all(over) else "",
        unchanged=_rate(record["unchanged"]),
        **{name: record[name] for name in ("kl", "kl_answers", "perplexity")},
    )


def _rate(rate: Mapping[str, Any]) -> str:
    """`3 of 100 [0.6 %, 8.5 %]`."""
    return f"{rate['count']} of {rate['prompts']} [{100 * rate['low']:.1f} %, {100 * rate['high']:.1f} %]"


def checked(record: Mapping[str, Any], trial: Trial, prompts: int) -> str:
    """The section that says what verification found: `record` as in `result.json`, of an export of `trial`.

    `prompts`: the number of harmful ones.
    """
    if record["ok"]:
        verdict = "The export was read back from disk; it is what the trial was, within rounding."
    else:
        failed = ", ".join(name for name, passed in record["checks"].items() if not passed) or plain(record["reason"])
        verdict = (
            f"**The check failed** ({failed}): read back from disk, this export differs from the trial by more than rounding "
            "explains, so the figures above are not its own. Don't use it before you know why."
        )
    figures = []
    if "scores" in record:
        figures.append(_score_table(record, trial, prompts))
    elif "weight_error" in record:
        figures.append("No prompts were run on it: the scores above are the trial's, of its edits in memory.")
    if "weight_error" in record:
        error = record["weight_error"]["max"]
        largest = f"{error:.1e}" if error is not None else "infinite"
        rest = "Everything else is the base's." if record["checks"]["untouched"] else "**Other parts differ from the base's.**"
        figures.append(
            "Every edited matrix was compared with the edit's definition, computed anew from the base's: largest relative "
            f"error {largest}. {rest}"
        )
    return _CHECKED.format(verdict=verdict, figures="\n\n".join(figures))


def _score_table(record: Mapping[str, Any], trial: Trial, prompts: int) -> str:
    divergences = "; ".join(
        f"{name} prompts mean {found['mean']:.1e}, max {found['max']:.1e}" for name, found in record["kl_from_trial"].items()
    )
    return _SCORES.format(
        prompts=prompts,
        refusals=trial.refusals,
        found_refusals=record["scores"]["refusals"],
        kl=trial.kl,
        found_kl=record["scores"]["kl"]["mean"],
        divergences=divergences,
        module=f"{record['module_error']['max']:.2%}",
    )
