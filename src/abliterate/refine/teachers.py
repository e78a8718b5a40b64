"""Teachers: edited models whose answers become the targets of refinement."""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.types import Kernel, Trial, TrialParams

# Trials that are tried as teachers, those with the most answers first; and the training prompts on which teachers are compared.
BEST, COMPARED = 4, 16
# Plain edits, which rival the trials: positions of the one direction, as fractions of n_layers − 1, None for each layer's
# own; and the coeff of the MLPs beside the attention's 1. Each edits the upper 70 % of the layers.
_POSITIONS: tuple[float | None, ...] = (0.5, 0.6, 0.7, None)
_MLP = (1.0, 0.0)
_FROM = 0.3
# The teachers that are compared, at most.
TEACHERS = BEST + len(_POSITIONS) * len(_MLP)


def best_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The complete trials of a search that leave the fewest prompts unanswered, of equal ones those with the least KL."""
    complete = [trial for trial in trials if trial.state == "complete" and isinstance(trial.params, TrialParams)]

    def unanswered(trial: Trial) -> int:
        return trial.unanswered if "unanswered" in trial.scores else trial.refusals

    return sorted(complete, key=lambda trial: (unanswered(trial), trial.kl, trial.number))[:BEST]


def plain_edits(n_layers: int, components: Sequence[str]) -> list[TrialParams]:
    """A handful of edits of equal strength in the upper layers, in the run's own mode, which need no search."""
    last = n_layers - 1
    found = []
    for mlp in _MLP if any(component.startswith("mlp") for component in components) else _MLP[:1]:
        kernels = {
            component: Kernel(coeff, last, coeff, max(1.0, (1 - _FROM) * last))
            for component in components
            for coeff in [mlp if component.startswith("mlp") else 1.0]
        }
        for position in _POSITIONS:
            scope, index = ("per layer", 0.6) if position is None else ("global", position)
            found.append(TrialParams(scope, index * last, kernels))  # type: ignore[arg-type]
    return found
