"""What every stage may use: settings, reporter, the store of artifacts, and the check for an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from abliterate.artifacts.cache import ArtifactStore, default_root
from abliterate.artifacts.result import RunResult
from abliterate.prompts.datasets import load_prompts
from abliterate.prompts.sets import PromptSets, prompt_sources
from abliterate.settings.schema import Settings
from abliterate.types import Reporter


@dataclass(frozen=True)
class Context:
    """What every stage may use."""

    settings: Settings
    reporter: Reporter
    result: RunResult
    store: ArtifactStore
    check: Callable[[], None]


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


def make_store(settings: Settings, reporter: Reporter) -> ArtifactStore:
    """The artifact store that the settings name."""
    efficiency = settings.efficiency
    return ArtifactStore(
        default_root(efficiency.residual_cache_dir or settings.cache_dir),
        warn=reporter.warn,
        enabled=efficiency.enable_residual_cache,
        in_memory=efficiency.cache_residuals_in_memory,
    )
