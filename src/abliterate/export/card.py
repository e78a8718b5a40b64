"""The model card of an export: plainly what was done to which model, what was measured, and how to make it again.

The commands in it name no path of this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from abliterate._version import __version__
from abliterate.export.base_card import front_lines
from abliterate.files import expanded
from abliterate.model.loader import public_name
from abliterate.objectives import CLASSIFIER, DEFAULT, SETTINGS_NAMING_SCORERS, is_custom, public
from abliterate.prompts.files import public_source
from abliterate.report.refined import prompt_texts, refined_text
from abliterate.report.tables import heldout_table, score_table, verification_table
from abliterate.settings.schema import Settings
from abliterate.types import Baseline, Column, Params, RefinedParams, Table, Trial

# Settings that have options of their own, or that matter on this machine only.
_ELSEWHERE = {
    *("model", "seed", "device", "out", "cache_dir", "load.revision", "load.dtypes", "load.offload_folder"),
    *("efficiency.residual_cache_dir", "search.grace_seconds"),
    *("search.trials", "search.startup_trials", "search.seed_from", "search.storage"),
    *("search.select", "search.select_max_kl"),
    *("export.kind", "export.verify", "export.push", "export.push_private"),
}

# Settings that no trial depends on: the prompts and scorers that measure the chosen trial at the end. Some are paths.
UNTRIED = {
    *("prompts.harmful_heldout", "prompts.harmless_heldout", "prompts.over_refusal"),
    *("evaluation.heldout_scorers", "evaluation.judge_model", "evaluation.judge_label"),
}

_VERSIONS = ("abliterate", "torch", "transformers", "optuna")

# Settings that may name a file. The card gives the file's name without its folder, and a hash of its content.
FILES = {
    "harmful prompts, direction": "prompts.harmful",
    "harmless prompts, direction": "prompts.harmless",
    "harmful prompts, scores": "prompts.harmful_eval",
    "harmless prompts, scores": "prompts.harmless_eval",
    "refusal markers": "evaluation.markers",
    "chat template": "load.chat_template",
}

# A list of capabilities, of which each may be a source of prompts.
PROTECTED = "directions.protect"

_SECTION = """
## How to reproduce

{fence}console
{commands}
{fence}

With these files, versions, kind of device and batch sizes the search is the same, trial by trial; other batch sizes move the
last bits. Without a search, and with the hashes of files and the scores compared: `abliterate reproduce recipe.json`, with the
file beside this one.

{facts}
"""


def recipe(settings: Settings, record: Mapping[str, Any], kind: str, trial: int) -> str:
    """The section "How to reproduce" for an export of `trial` of the run that `record` (`result.json`) is of."""
    columns = (Column("name", "", "word"), Column("value", "", "text"))
    facts = markdown(Table("", columns, tuple(_facts(settings, record))), str)  # their code spans are Markdown already
    shown = "\n".join(f"$ {line}" for line in commands(settings, record, kind, trial))
    longest = max(map(len, re.findall("`+", shown)), default=0)
    return _SECTION.format(commands=shown, facts=facts, fence="`" * max(3, longest + 1))


def markdown(table: Table, escaped: Callable[[str], str] | None = None) -> str:
    """A table as Markdown, without its title and notes. `escaped` makes Markdown of a text, by default as `plain` does."""
    escaped = escaped or plain
    lines = [[column.heading for column in table.columns], ["---"] * len(table.columns)]
    lines += [[escaped(text) for text in row] for row in table.texts]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def code(text: str) -> str:
    """Any text as code within a table of Markdown: in one line, and no character of it is markup."""
    text = visible(" ".join(text.split())).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}" if longest else f"`{text}`"


def plain(text: str) -> str:
    """Any text escaped for a line of Markdown, which then shows it as it is."""
    return re.sub(r"([\\`*\[\]<>|&#~])", r"\\\1", visible(" ".join(text.split())))


def is_visible(text: str) -> bool:
    """Whether a name can be shown as it is. File names may have other spaces than ours, and emoji that are joined."""
    return all(char.isprintable() or char == "\u200d" or unicodedata.category(char) == "Zs" for char in text)


def visible(text: str) -> str:
    """Text with its control and other invisible characters written as Python writes them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def commands(settings: Settings, record: Mapping[str, Any], kind: str, trial: int) -> list[str]:
    """The command lines: a run, and the export of one of its trials, which need not be on its front."""
    model, revision = record["model"], record["model"]["revision"]
    search = settings.search
    name = public_name(settings.model)
    name = f"./{name}" if name.startswith("-") else name
    run = ["abliterate", "run", name, "--seed", str(settings.seed), "-n", str(search.trials)]
    # The number of random trials is set when a study begins: 30 % of the trials that it is given then.
    run += ["--startup-trials", str(record.get("startup_trials") or search.n_startup_trials), "--dtype", model["dtype"]]
    if revision:
        run += ["--set", f"load.revision={_toml(revision)}"]
    for name, value in (*changed_settings(settings), *_judge(settings)):
        shown = public_source(value) if name in FILES.values() else value
        shown = [public(scorer) for scorer in value] if name in SETTINGS_NAMING_SCORERS else shown
        shown = [public_source(entry) for entry in value] if name == PROTECTED else shown
        run += ["--set", f"{name}={_toml(shown)}"]
    export = ["abliterate", "export", "run", "--trial", str(trial), "--kind", kind]
    return [" ".join(map(_quoted, line)) for line in ([*run, "--export", "none", "-o", "run"], export)]


def changed_settings(settings: Settings) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting that isn't the default, but for the settings that the command names itself."""
    defaults = dict(_flat(Settings.model_construct()))
    for name, value in _flat(settings):
        if name not in _ELSEWHERE | UNTRIED and value != defaults[name]:
            yield name, value


def _judge(settings: Settings) -> Iterator[tuple[str, str]]:
    """The judge's settings if trials are scored by it; a directory is named without its parents."""
    if CLASSIFIER in settings.scorers:
        yield "evaluation.judge_model", public_source(settings.evaluation.judge_model)
        if settings.evaluation.judge_label:
            yield "evaluation.judge_label", settings.evaluation.judge_label


def _quoted(text: str) -> str:
    """An argument as a shell reads it, with control characters in the form of `$'…'`."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _escaped(escaped) + "'"


def _escaped(text: str) -> str:
    """Text with unprintable characters in the form that TOML's strings and shells read."""
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in text)


def _flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _facts(settings: Settings, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, environment = record["model"], record["environment"]
    revision = f", revision {code(model['revision'])}" if model["revision"] else ""
    yield "base", f"{plain(model['id'])}{revision}, fingerprint {code(model['fingerprint'])}"
    sets = record.get("prompts", {})
    for title, name in FILES.items():
        section, option = name.split(".")
        if section == "prompts":
            used = sets.get(option)
            yield title, f"{code(used['source'])}, {used['count']}, sha256 {code(used['digest'])}" if used else "not recorded"
        elif path := getattr(getattr(settings, section), option):
            yield title, f"{code(public_source(path))}, sha256 `{file_digest(path)}`"
    for name in filter(is_custom, settings.scorers):
        yield "scorer", f"{code(public(name))}, sha256 `{file_digest(name.rpartition(':')[0])}`"
    if sizes := record.get("batch_sizes"):
        yield "batch sizes", ", ".join(f"{plain(name)} {size}" for name, size in sizes.items())
    versions = {name: plain(environment["versions"].get(name, "unknown")) for name in _VERSIONS}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "device", plain(f"{environment['device']}, {model['dtype']}, quantization {model['quantization']}")


def file_digest(path: str) -> str:
    """The sha256 of a file that settings name."""
    try:
        return hashlib.sha256(expanded(path).read_bytes()).hexdigest()
    except OSError:  # the file was moved since the run, whose identity holds the hash of its content
        return "not at hand"


def _toml(value: Any) -> str:
    """A value as `--set` reads it: TOML on one line, whose strings are JSON's."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    # Not escaped beyond ASCII, because JSON's pairs of surrogates are no TOML.
    return _escaped(json.dumps(value, ensure_ascii=False))


_CARD = """\
---
{front}
---

# {base}, {title}

This is {base}{revision} after {done} {trained}{dequantized}{adapter}

{altered} Whoever runs or passes on this model answers for what it is used for.

{scores}

The scores are those of the prompts that the search optimized over, so they are optimistic; neither a marker count nor the
base's probabilities are a judgement of the answers' quality or safety.
{heldout}
Edit `{mode}` ({representation}{approximation}), direction method `{method}`; trial {number} of a search with seed {seed}{over},
made with abliterate {version}. Parameters:

```json
{params}
```
{recipe}"""

_ABLATED = """\
directional ablation: {direction} along which the model separates {separated} \
{was} removed from matrices that write to the residual stream{readers}.{kept}"""

_READERS = """,
and from the inputs of matrices that read it"""

_KEYS = """ The removal
acts on what is special about the inputs of these matrices on harmful prompts; what they do to inputs in the leading directions
of those on harmless prompts is left as it was."""

_WEIGHED = """ The removal
acts on what is special about the inputs of these matrices on harmful prompts: in least squares, it moves what they do to inputs
on harmless prompts as little as that allows."""

_MOVED = """\
arbitrary-rank ablation: matrices that write to the residual stream
were changed so that they treat {separated} alike."""

# The card's words if the model refuses fewer of the harmful prompts than the base, and if it doesn't.
_LESS = {
    "title": "with refusal ablated",
    "separated": "prompts it refuses\nfrom prompts it answers",
    "altered": "**Its safety behaviour was altered on purpose.** It refuses less than the base model, also where the base\n"
    "model was right to refuse.",
}

_NOT_LESS = {
    "title": "with a direction ablated",
    "separated": "one set of prompts\n(called harmful) from another (called harmless)",
    "altered": "**Its behaviour was altered on purpose**, by a search over {named}. Of the harmful prompts\n"
    "below it refuses {compared} the base model does.",
}

_ADAPTER = """

This is an adapter for PEFT, not a whole model: `PeftModel.from_pretrained(base, this folder)` loads it onto the base."""

_UNTRAINED = "No training took place."

_OPTIMIZED = """Each change was
found by an optimization of that matrix's own outputs; the model as a whole was not trained."""

_REFINED = """**Its strengths and directions were learned by
gradient** ({found}): each of the {count} edited matrices loses {direction} of its own, with a strength of its own{start}. No
other number of the model was trained. Trained on: {prompts}. β weighs how far the answers to harmless prompts may move."""

_DORA = """ Its kind is
**DoRA**, which vLLM and llama.cpp don't load. A run with `--set edit.mode=pre` makes a plain LoRA, which they do, and
`abliterate export --kind merged` a whole model."""

_HELDOUT = """
## On prompts that were held out

Neither directions nor the search saw these prompts ({sources}). In brackets: 95 % confidence (Clopper-Pearson). A faulty
answer is empty, repetitive, broken off or still thinking. Base answers are the base's to the harmless prompts. KL is
KL(base‖this), in nats.

{figures}
"""

_CHECKED = """
## Checked after reloading

{verdict}

{figures}
"""

_MISSING = """
## What is missing

**{count} tensors of the base aren't in this export**, because `transformers` doesn't load them and the base's format can't be
read without it: {names}.
"""

_SCORES = """\
{table}

KL(trial‖export) of the first token: {divergences}. Largest error of one module's edit: {module}."""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card's text; `facts` has the names in the template, `kl` as JSON-able values.

    `n_harmless`: None if the result doesn't name its prompts. `on_hub`: whether `base` is the name of a model on the Hub.
    `quantized`: how the base's files are quantized, or ""; `dense`: whether this export has weights of its own.
    `base_card`: the base's `front_matter`; `adapter`: "dora" or "lora" if the export is an adapter, else "".
    `objectives`: those of the search; `before_values`, `values`: further scores, of the base and of the trial;
    `before_kinds`, `kinds`: their records of the scorer `unanswered`, or None.
    `params`: the trial's parameters, of either kind.
    `approximation` {"mean", "max"}: the share of each matrix's change that a low-rank representation loses; empty if exact.
    """
    name = " ".join(str(facts["base"]).split())
    facts = {**facts, "base": plain(name)}  # a directory's name may hold any character
    revision = f" (revision {plain(facts['revision'])})" if facts["revision"] else ""
    params = json.dumps(_shown_params(facts["params"]), indent=1)
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
    adapter = facts.get("adapter", "")
    base_model = [f"base_model: {name}"] if facts["on_hub"] else []
    named = ", ".join(f"{code(objective.name)} ({objective.goal}d)" for objective in facts["objectives"])
    tags = ("abliterated", "abliterate") if facts["after"] < facts["before"] else ("abliterate",)
    count, learned = facts["params"].directions, facts.get("learned", False)
    wording = _wording(facts["before"], facts["after"], named) | {
        "direction": "the direction" if count == 1 else f"the {count} directions of each layer",
        "was": "was" if count == 1 else "were",
        "readers": _READERS if facts.get("readers") else "",
        "kept": {"key-conditional": _KEYS, "least-squares": _WEIGHED}.get(facts["mode"], ""),
    }
    texts = wording | {
        "done": (_MOVED if learned else _ABLATED).format(**wording),
        "over": f" over {named}" if tuple(facts["objectives"]) != DEFAULT else "",
        "scores": _scores(facts),
        "trained": _OPTIMIZED if learned else _trained(facts["params"]),
        "dequantized": dequantized,
        "heldout": _heldout(facts.get("heldout")),
        "adapter": (_ADAPTER if adapter else "") + (_DORA if adapter == "dora" else ""),
        "front": "\n".join([*base_model, *front_lines(facts.get("base_card", {}), tags)]),
        "revision": revision,
        "params": params,
        "approximation": approximation,
        "version": __version__,
    }
    return _CARD.format(**{**facts, **texts})


def _trained(params: Params) -> str:
    """The card's words on what was trained."""
    if not isinstance(params, RefinedParams):
        return _UNTRAINED
    facts, sets = params.facts, prompt_texts(params)
    begun = facts.get("start")
    start = {int: f", taught by the answers of trial {begun}", str: ", taught by the answers of a plain edit"}.get(
        type(begun), ""
    )
    prompts = "; ".join(f"{plain(name)} prompts ({plain(text)})" for name, text in sets.items()) or "not recorded"
    direction = "a direction" if params.directions == 1 else f"{params.directions} directions"
    found = {"found": plain(refined_text(params)), "count": params.edited, "direction": direction}
    return _REFINED.format(**found, start=start, prompts=prompts)


def _shown_params(params: Params) -> dict[str, Any]:
    """The parameters as the card shows them; of refined ones, how they were found: the recipe beside the card has all."""
    record = params.to_record()
    if not isinstance(params, RefinedParams):
        return record
    facts = {name: value for name, value in params.facts.items() if name != "cosine"}
    return {"kind": record["kind"], "directions": {"file": params.file, "sha256": params.sha256}, "facts": facts}


def _scores(facts: Mapping[str, Any]) -> str:
    """The table of scores; the names of further scorers are foreign text, and shown as code."""
    values = facts["values"]
    baseline = Baseline(facts["before"], facts["n_harmful"], facts["before_values"], facts.get("before_kinds"))
    table = score_table(baseline, facts["after"], facts["kl"], values, facts["n_harmless"], facts.get("kinds"))
    return markdown(table, lambda text: code(text) if text in values else plain(text))


def _wording(before: int, after: int, named: str) -> dict[str, str]:
    """The card's words about refusals `before` and `after`; objectives may ask for another change than fewer refusals."""
    if after < before:
        return _LESS
    compared = "as many as" if after == before else "more than"
    return _NOT_LESS | {"altered": _NOT_LESS["altered"].format(named=named, compared=compared)}


def _heldout(record: Mapping[str, Any] | None) -> str:
    """The section on held-out prompts, from the record in `result.json`; empty if there is no record."""
    if not record:
        return ""
    sources = "; ".join(f"{prompts['count']} of {plain(prompts['source'])}" for prompts in record["prompts"].values())
    return _HELDOUT.format(sources=sources, figures=markdown(heldout_table(record, "this model")))


def checked(record: Mapping[str, Any], trial: Trial, prompts: int) -> str:
    """The section with the verdict of the verification: `record` as in `result.json`, of an export of `trial`.

    `prompts`: the number of harmful prompts.
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
        factors = record.get("compared_with") == "factors"
        expected = "the factors that the optimization found" if factors else "the edit's definition, computed anew"
        figures.append(
            f"Every edited matrix was compared with {expected} from the base's: largest relative "
            f"error {largest}. {_rest(record)}"
        )
    return _CHECKED.format(verdict=verdict, figures="\n\n".join(figures))


def _rest(record: Mapping[str, Any]) -> str:
    """The sentence on everything that wasn't edited."""
    if record["checks"]["untouched"]:
        loaded = record.get("loaded_in")
        return f"Everything else is the base's{f', as transformers loads it in {loaded}' if loaded else ''}."
    differs = ", ".join(map(code, record.get("differs", ())))
    return f"**Other parts differ from the base's, or are missing{f': {differs}' if differs else ''}.**"


def missing_section(names: Sequence[str]) -> str:
    """The section of a card on the tensors of the base that the export lacks."""
    return _MISSING.format(count=len(names), names=", ".join(map(code, names)))


def _score_table(record: Mapping[str, Any], trial: Trial, prompts: int) -> str:
    divergences = "; ".join(
        f"{name} prompts mean {kl['mean']:.1e}, max {kl['max']:.1e}" for name, kl in record["kl_from_trial"].items()
    )
    table = markdown(verification_table(record, trial, prompts))
    return _SCORES.format(table=table, divergences=divergences, module=f"{record['module_error']['max']:.2%}")
