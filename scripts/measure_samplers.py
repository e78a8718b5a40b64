r"""Do other samplers, starts, kernels or ranges find better fronts than TPE? Writes docs/generated/samplers.md.

A search of a hundred real trials takes minutes, so each variant searches a surrogate: random forests that predict KL and
refusals from the coeff of every layer, fitted to the recorded trials of a run whose trials were spread over a wide space and
never pruned. It can compare the ways of looking, and not the models:

    for set in harmful harmless; do head -32 src/abliterate/demo/prompts/${set}_eval.jsonl > $set.jsonl; done
    .venv/bin/abliterate run demo -c scripts/recorded_trials.toml --harmful-eval harmful.jsonl --harmless-eval harmless.jsonl \
        -o runs/rec-demo
    .venv/bin/python scripts/measure_samplers.py runs/rec-demo --seeds 12
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import InMemoryStorage
from sklearn.ensemble import RandomForestRegressor

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.objectives import BY_MARKERS
from abliterate.search.front import volume
from abliterate.search.pruner import DominancePruner
from abliterate.search.space import Space
from abliterate.search.study import Study
from abliterate.settings.schema import SearchSettings
from abliterate.types import Baseline, Trial, TrialParams

ANY_LAYER = {"position": (0.0, 1.0), "direction_index": (0.0, 1.0)}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "tpe (default)": {},
    "random": {"startup_trials": 10_000},
    "sobol alone": {"startup": "sobol", "startup_trials": 10_000},
    "gp": {"sampler": "gp"},
    "nsga2": {"sampler": "nsga2"},
    "tpe, sobol start": {"startup": "sobol"},
    "gp, sobol start": {"sampler": "gp", "startup": "sobol"},
    "tpe, silhouette prior": {"prior": "silhouette"},
    "tpe, gaussian": {"kernel": "gaussian"},
    "tpe, cosine": {"kernel": "cosine"},
    "tpe, any layer": ANY_LAYER,
    "tpe, any layer, silhouette prior": {**ANY_LAYER, "prior": "silhouette"},
}
# The rectangle of which a front's share is taken: up to the KL that `--select auto` prefers, and to all prompts refused.
REFERENCE = (0.1, 1.0)
_LEAST = 1e-4  # KL is learned as a logarithm, and below this it makes no difference
_TREES = 48


class Surrogate:
    """Predicts scores of parameters from a run's complete trials; `quality` has the out-of-bag R² of log KL and refusals."""

    def __init__(self, run: Path) -> None:
        result = Result.read(RunDirectory(run))
        assert result.baseline is not None
        assert result.model is not None
        self.baseline: Baseline = result.baseline
        self.n_layers = result.model.n_layers
        self.name = result.model.id
        done = [trial for trial in result.trials if trial.state == "complete"]
        self.components = tuple(done[0].params.kernels)  # type: ignore[union-attr]
        self.count = len(done)
        inputs = np.concatenate([self._features(trial.params) for trial in done])  # type: ignore[arg-type]
        targets = [
            [np.log10(max(_LEAST, trial.kl)) for trial in done],
            [trial.refusals / self.baseline.prompts for trial in done],
        ]
        forests = [RandomForestRegressor(_TREES, random_state=0, oob_score=True, max_features=0.5) for _ in targets]
        self._trees = [forest.fit(inputs, target).estimators_ for forest, target in zip(forests, targets, strict=True)]
        self.quality = [float(forest.oob_score_) for forest in forests]
        geometry = json.loads((run / "geometry.json").read_text(encoding="utf-8"))
        self.prior = tuple(row["silhouette"] or 0.0 for row in geometry["layers"][1:])

    def _features(self, params: TrialParams) -> np.ndarray:
        """(1, n) float32: every module's coeff, and where a global direction comes from."""
        coeffs = [params.kernels[name].coeff(layer) for name in self.components for layer in range(self.n_layers)]
        everywhere = params.scope == "global"
        return np.array([[*coeffs, float(everywhere), params.direction_index * everywhere]], dtype=np.float32)

    def trial(self, number: int, params: TrialParams, done: Sequence[Trial]) -> Trial:
        """The trial as a run would have it, pruned by the trials before it."""
        inputs = self._features(params)
        log_kl, share = (float(np.mean([tree.tree_.predict(inputs)[0, 0] for tree in trees])) for trees in self._trees)
        kl, refusals = 10**log_kl, round(share * self.baseline.prompts)
        limit = DominancePruner.of(done, self.baseline, BY_MARKERS).limit({"kl": kl}, "refusals")
        stopped = limit is not None and refusals >= limit
        scores = {"kl": {"mean": kl}, "refusals": limit if stopped else refusals}
        return Trial(number, params, "stopped" if stopped else "complete", scores)


def search(surrogate: Surrogate, variant: Mapping[str, Any], trials: int, seed: int) -> tuple[float, float]:
    """(share of the rectangle that the front dominates, seconds of the sampler) of one study."""
    settings = SearchSettings(trials=trials, **variant)
    space = Space(settings, surrogate.n_layers, surrogate.components, BY_MARKERS)
    study = Study(InMemoryStorage(), "study", space, seed)
    if settings.prior == "silhouette":
        study.begin(prior=surrogate.prior)
    done: list[Trial] = []
    seconds = 0.0
    for number in range(trials):
        started = time.process_time()
        asked = study.ask()
        seconds += time.process_time() - started
        assert asked is not None
        trial = surrogate.trial(number, asked.params, done)
        study.tell(asked, trial, surrogate.baseline.prompts)
        done.append(trial)
    points = [(trial.kl, trial.refusals / surrogate.baseline.prompts) for trial in done if trial.state == "complete"]
    return volume(points, REFERENCE) / (REFERENCE[0] * REFERENCE[1]), seconds


def table(surrogate: Surrogate, budgets: Sequence[int], seeds: int) -> list[str]:
    """The rows of one surrogate's table."""
    lines = []
    default: dict[int, list[float]] = {}
    for name, variant in VARIANTS.items():
        cells = []
        for trials in budgets:
            shares, seconds = zip(*(search(surrogate, variant, trials, seed) for seed in range(seeds)), strict=True)
            base = default.setdefault(trials, list(shares))
            gains = [share - other for share, other in zip(shares, base, strict=True)]
            error = statistics.stdev(gains) / seeds**0.5
            gain = f"{statistics.mean(gains):+.3f} ± {error:.3f}" if name != next(iter(VARIANTS)) else "–"
            cells += [f"{statistics.mean(shares):.3f}", f"{min(shares):.3f}", gain]
        lines.append(f"| {name} | {' | '.join(cells)} | {1000 * statistics.mean(seconds) / trials:.0f} |")
        print(surrogate.name, lines[-1], flush=True)
    return lines


def page(surrogates: Sequence[Surrogate], budgets: Sequence[int], seeds: int) -> str:
    """All tables as Markdown."""
    runs = [f"runs/{Path(text).name}" if Path(text).is_dir() else text for text in sys.argv[1:]]
    heads = "".join(f" {n} trials: mean | worst | against the default |" for n in budgets)
    lines = [
        "# Other samplers, starts, kernels and ranges",
        "",
        f"Generated by `python scripts/measure_samplers.py {' '.join(runs)}` on {datetime.date.today()}, with {seeds} seeds.",
        "",
        f"The figures are the share of the rectangle (KL {REFERENCE[0]}, share of refusals {REFERENCE[1]:.0f}) that the front",
        "dominates: more is better. *Against the default* is the mean difference by seed with its standard error. The searches",
        "run on surrogates: random forests that predict KL and refusals from each layer's coeff, fitted to the recorded trials",
        "of a run without pruning; trials are pruned as in a run. A surrogate has plateaus and blurs what trials beside each",
        "other recorded, so small differences mean nothing, and a choice that matters is measured live.",
    ]
    for surrogate in surrogates:
        kl, refusals = surrogate.quality
        lines += [
            "",
            f"## {surrogate.name}: {surrogate.count} recorded trials on {surrogate.baseline.prompts} harmful prompts",
            "",
            f"Out-of-bag R²: {kl:.2f} for log KL, {refusals:.2f} for the share of refusals.",
            "",
            f"| variant |{heads} ms of the sampler a trial |",
            "|---|" + "---|" * (3 * len(budgets) + 1),
            *table(surrogate, budgets, seeds),
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Compare the variants on every run's surrogate and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="Runs with recorded trials.")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 40])
    args = parser.parse_args()
    text = page([Surrogate(run) for run in args.runs], args.budgets, args.seeds)
    (Path(__file__).parents[1] / "docs" / "generated" / "samplers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
