"""The model card of an export: plainly what was done to which model, what was measured, and how to make it again.

The commands in it name no path of this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from abliterate._version import __version__
from abliterate.model.loader import public_name
from abliterate.objectives import CLASSIFIER, DEFAULT, OWN, is_custom, public
from abliterate.prompts.files import public_source
from abliterate.settings.schema import Settings
from abliterate.types import Trial

# Said by options of their own, or of this machine only.
_ELSEWHERE = {
    *("model", "seed", "device", "out", "cache_dir", "load.revision", "load.dtypes", "load.offload_folder"),
    *("efficiency.residual_cache_dir", "search.grace_seconds"),
    *("search.trials", "search.startup_trials", "search.storage", "search.select", "search.select_max_kl"),
    *("export.kind", "export.verify", "export.push", "export.push_private"),
}

# No part of what a trial is: what the chosen one is measured on and by at the end. Some are paths.
UNTRIED = {
    *("prompts.harmful_heldout", "prompts.harmless_heldout", "prompts.over_refusal"),
    *("evaluation.heldout_scorers", "evaluation.judge_model", "evaluation.judge_label"),
}

# Settings that may name a file: by its last part, and its content by a hash.
FILES = {
    "harmful prompts, direction": "prompts.harmful",
    "harmless prompts, direction": "prompts.harmless",
    "harmful prompts, scores": "prompts.harmful_eval",
    "harmless prompts, scores": "prompts.harmless_eval",
    "refusal markers": "evaluation.markers",
    "chat template": "load.chat_template",
}

_SECTION = """
## How to reproduce

{fence}console
{commands}
{fence}

With these files, versions, kind of device and batch sizes the search is the same, trial by trial; other batch sizes move the
last bits. Without a search, and with the hashes of files and the scores compared: `abliterate reproduce recipe.json`, with the
file beside this one.

| | |
|---|---|
{rows}
"""


def recipe(settings: Settings, record: Mapping[str, Any], kind: str, trial: int) -> str:
    """The section "How to reproduce" for an export of `trial` of the run that `record` (`result.json`) is of."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(settings, record))
    shown = "\n".join(f"$ {line}" for line in commands(settings, record, kind, trial))
    longest = max(map(len, re.findall("`+", shown)), default=0)
    return _SECTION.format(commands=shown, rows=rows, fence="`" * max(3, longest + 1))


def code(text: str) -> str:
    """Any text as code within a table of Markdown: in one line, and nothing of it means anything."""
    text = visible(" ".join(text.split())).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}" if longest else f"`{text}`"


def plain(text: str) -> str:
    """Any text within a line of Markdown, where it is shown as it is."""
    return re.sub(r"([\\`*\[\]<>|&#~])", r"\\\1", visible(" ".join(text.split())))


def visible(text: str) -> str:
    """Text with control characters, and all else that can't be seen, as they are written in Python."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def commands(settings: Settings, record: Mapping[str, Any], kind: str, trial: int) -> list[str]:
    """The command lines: a run, and the export of one of its trials, which need not be on its front."""
    model, revision = record["model"], record["model"]["revision"]
    search = settings.search
    name = public_name(settings.model)
    name = f"./{name}" if name.startswith("-") else name
    run = ["abliterate", "run", name, "--seed", str(settings.seed), "-n", str(search.trials)]
    # As the study began: 30 % of the trials it was given then.
    run += ["--startup-trials", str(record.get("startup_trials") or search.n_startup_trials), "--dtype", model["dtype"]]
    if revision:
        run += ["--set", f"load.revision={_toml(revision)}"]
    for name, value in (*changed_settings(settings), *_judge(settings)):
        shown = public_source(value) if name in FILES.values() else value
        shown = [public(one) for one in value] if name in OWN else shown
        run += ["--set", f"{name}={_toml(shown)}"]
    export = ["abliterate", "export", "run", "--trial", str(trial), "--kind", kind]
    return [" ".join(map(_quoted, line)) for line in ([*run, "--export", "none", "-o", "run"], export)]


def changed_settings(settings: Settings) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting that isn't the default, but for those that the command names itself."""
    defaults = dict(_flat(Settings.model_construct()))
    for name, value in _flat(settings):
        if name not in _ELSEWHERE | UNTRIED and value != defaults[name]:
            yield name, value


def _judge(settings: Settings) -> Iterator[tuple[str, str]]:
    """The judge's settings where trials are scored by it; of a directory its name."""
    if CLASSIFIER in settings.scorers:
        yield "evaluation.judge_model", public_source(settings.evaluation.judge_model)
        if settings.evaluation.judge_label:
            yield "evaluation.judge_label", settings.evaluation.judge_label


def _quoted(text: str) -> str:
    """An argument as a shell reads it; control characters as `$'…'` has them."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _escaped(escaped) + "'"


def _escaped(text: str) -> str:
    """What can't be printed as TOML's strings and shells take it."""
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def _flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _facts(settings: Settings, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, environment = record["model"], record["environment"]
    revision = f", revision {code(model['revision'])}" if model["revision"] else ""
    yield "base", f"{plain(model['id'])}{revision}, fingerprint `{model['fingerprint']}`"
    # A run of an earlier version didn't record its prompts.
    sets = record.get("prompts", {})
    for what, name in FILES.items():
        section, option = name.split(".")
        if section == "prompts":
            found = sets.get(option)
            yield what, f"{code(found['source'])}, {found['count']}, sha256 `{found['digest']}`" if found else "not recorded"
        elif path := getattr(getattr(settings, section), option):
            yield what, f"{code(public_source(path))}, sha256 `{file_digest(path)}`"
    for name in filter(is_custom, settings.scorers):
        yield "scorer", f"{code(public(name))}, sha256 `{file_digest(name.rpartition(':')[0])}`"
    if sizes := record.get("batch_sizes"):
        yield "batch sizes", ", ".join(f"{name} {size}" for name, size in sizes.items())
    versions = environment["versions"]
    yield "versions", ", ".join(f"{name} {versions[name]}" for name in ("abliterate", "torch", "transformers", "optuna"))
    yield "device", f"{environment['device']}, {model['dtype']}, quantization {model['quantization']}"


def file_digest(path: str) -> str:
    """sha256 of a file that settings name."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:  # moved since the run; the run's identity holds its content
        return "not at hand"


def _toml(value: Any) -> str:
    """A value as `--set` reads it: TOML on one line, whose strings are JSON's."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    # Not escaped beyond ASCII: JSON's pairs of surrogates are no TOML.
    return _escaped(json.dumps(value, ensure_ascii=False))


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
