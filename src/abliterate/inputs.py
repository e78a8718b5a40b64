"""What every stage is given: the run's context, and its four prompt sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from abliterate.cache import ArtifactStore
from abliterate.model import loader
from abliterate.model.data import load_prompts
from abliterate.model.loader import DEMO
from abliterate.results import RunResult
from abliterate.settings import Settings
from abliterate.types import Prompt, Reporter

HUB_PROMPTS = {
    "harmful": "mlabonne/harmful_behaviors:train[:400]:text",
    "harmless": "mlabonne/harmless_alpaca:train[:400]:text",
    "harmful_eval": "mlabonne/harmful_behaviors:test[:100]:text",
    "harmless_eval": "mlabonne/harmless_alpaca:test[:100]:text",
}
DEMO_PROMPTS = {
    "harmful": "harmful_train.jsonl",
    "harmless": "harmless_train.jsonl",
    "harmful_eval": "harmful_eval.jsonl",
    "harmless_eval": "harmless_eval.jsonl",
}


@dataclass(frozen=True)
class Context:
    """What every stage may use."""

    settings: Settings
    reporter: Reporter
    result: RunResult
    store: ArtifactStore
    check: Callable[[], None]


@dataclass(frozen=True)
class PromptSets:
    """The two sets for directions and the two for scores."""

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    harmful_eval: tuple[Prompt, ...]
    harmless_eval: tuple[Prompt, ...]

    def all_sets(self) -> tuple[tuple[Prompt, ...], ...]:
        """The four sets in a fixed order."""
        return self.harmful, self.harmless, self.harmful_eval, self.harmless_eval


def prompt_sources(settings: Settings) -> dict[str, str]:
    """{set: source}: as given, else the demo's own, else the field's public sets."""
    folder = loader.demo_path() / "prompts"
    demo = {name: str(folder / file) for name, file in DEMO_PROMPTS.items()}
    defaults = demo if settings.model == DEMO else HUB_PROMPTS
    return {name: getattr(settings.prompts, name) or default for name, default in defaults.items()}


def read_prompts(context: Context) -> PromptSets:
    """All four prompt sets; a prompt in both a direction set and a score set is worth a warning."""
    with context.result.stage("prompts"):
        sources = prompt_sources(context.settings)
        sets = PromptSets(**{name: load_prompts(source, context.settings.prompts) for name, source in sources.items()})
        context.result.prompts(sources, {name: getattr(sets, name) for name in sources})
        for name in sources:
            part = getattr(sets, name)
            again = len(part) - len(set(part))
            if again:
                context.reporter.warn(
                    f"{again} of the {len(part)} prompts in the set {name} are there more than once, and count as often."
                )
        for name in ("harmful", "harmless"):
            shared = set(getattr(sets, name)) & set(getattr(sets, f"{name}_eval"))
            if shared:
                context.reporter.warn(
                    f"{len(shared)} of the {name} prompts are in both the direction set and the evaluation set, so scores "
                    "on them are optimistic."
                )
    return sets
