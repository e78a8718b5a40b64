"""The prompt sets of a run: two for the directions, two for the scores, and those that are held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from abliterate.model import loader
from abliterate.model.loader import DEMO
from abliterate.prompts.capabilities import capability_sources
from abliterate.prompts.datasets import load_prompts
from abliterate.settings.schema import Settings
from abliterate.types import Prompt

HUB_PROMPTS = {
    "harmful": "mlabonne/harmful_behaviors:train[:400]:text",
    "harmless": "mlabonne/harmless_alpaca:train[:400]:text",
    "harmful_eval": "mlabonne/harmful_behaviors:test[:100]:text",
    "harmless_eval": "mlabonne/harmless_alpaca:test[:100]:text",
}

_PROTECT = "protect "  # begins the names of protected sets among the others

DEMO_PROMPTS = {
    "harmful": "harmful_train.jsonl",
    "harmless": "harmless_train.jsonl",
    "harmful_eval": "harmful_eval.jsonl",
    "harmless_eval": "harmless_eval.jsonl",
}


@dataclass(frozen=True)
class PromptSets:
    """The two sets for directions and the two for scores.

    `protected` has the sets of the capabilities that directions spare, and the plain set that they are compared with.
    """

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    harmful_eval: tuple[Prompt, ...]
    harmless_eval: tuple[Prompt, ...]
    protected: dict[str, tuple[Prompt, ...]] = field(default_factory=dict)

    def all_sets(self) -> tuple[tuple[Prompt, ...], ...]:
        """The four sets in a fixed order."""
        return self.harmful, self.harmless, self.harmful_eval, self.harmless_eval

    def by_name(self) -> dict[str, tuple[Prompt, ...]]:
        """{name: prompts} of all sets, with those that are protected; the inverse of `of_names`."""
        four = {name: prompts for name, prompts in vars(self).items() if name != "protected"}
        return four | {_PROTECT + name: prompts for name, prompts in self.protected.items()}

    @staticmethod
    def of_names(sets: Mapping[str, tuple[Prompt, ...]]) -> PromptSets:
        """The inverse of `by_name`. TypeError if a set is missing, or one has another name."""
        protected = {name.removeprefix(_PROTECT): prompts for name, prompts in sets.items() if name.startswith(_PROTECT)}
        four = {name: prompts for name, prompts in sets.items() if not name.startswith(_PROTECT)}
        return PromptSets(**four, protected=protected)


def prompt_sources(settings: Settings) -> dict[str, str]:
    """{set: source}: as given, else the demo's own, else the field's public sets."""
    folder = loader.demo_path() / "prompts"
    demo = {name: str(folder / file) for name, file in DEMO_PROMPTS.items()}
    defaults = demo if settings.model == DEMO else HUB_PROMPTS
    return {name: getattr(settings.prompts, name) or default for name, default in defaults.items()}


def read_prompt_sets(
    settings: Settings, warn: Callable[[str], None], note: Callable[[str], None] = lambda text: None
) -> PromptSets:
    """All four prompt sets; a prompt in both a direction set and a score set is worth a warning."""
    sources = prompt_sources(settings)
    four = {name: load_prompts(source, settings.prompts, note) for name, source in sources.items()}
    protected = {name: load_prompts(source, settings.prompts, note) for name, source in capability_sources(settings).items()}
    sets = PromptSets(**four, protected=protected)
    for name in sources:
        prompts = getattr(sets, name)
        repeated = len(prompts) - len(set(prompts))
        if repeated:
            warn(f"{repeated} of the {len(prompts)} prompts in the set {name} are there more than once, and count as often.")
    for name in ("harmful", "harmless"):
        # The same question whatever its case, spaces and system prompt.
        directions, evaluation = (
            {" ".join(prompt.text.casefold().split()) for prompt in getattr(sets, each)} for each in (name, f"{name}_eval")
        )
        shared = directions & evaluation
        if shared:
            warn(
                f"{len(shared)} of the {name} prompts are in both the direction set and the evaluation set, so scores on them "
                "are optimistic."
            )
    return sets


HUB_HELDOUT = {
    "harmful_heldout": "JailbreakBench/JBB-Behaviors@behaviors:harmful:Goal",
    "harmless_heldout": "mlabonne/harmless_alpaca:test[100:200]:text",
    "over_refusal": "JailbreakBench/JBB-Behaviors@behaviors:benign:Goal",
}


@dataclass(frozen=True)
class HeldoutSets:
    """Prompts that neither directions nor the search have seen. `over_refusal`: harmless ones that look harmful, if any."""

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    over_refusal: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Heldout:
    """The sets, and what `result.json` says of them."""

    sets: HeldoutSets
    record: dict[str, dict[str, Any]]


def heldout_sources(settings: Settings) -> dict[str, str]:
    """{set: source}: as given, else the demo's own, else public sets that overlap least with the default ones."""
    folder = loader.demo_path() / "prompts"
    defaults = {name: str(folder / f"{name}.jsonl") for name in HUB_HELDOUT} if settings.model == DEMO else HUB_HELDOUT
    return {name: getattr(settings.prompts, name) or default for name, default in defaults.items()}
