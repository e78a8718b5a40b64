"""Standard benchmarks through lm-eval (the extra `eval`): base against candidate, one row a metric. Only if asked for."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from abliterate.errors import InputError
from abliterate.evaluation.forced import Side
from abliterate.inputs import Context


@dataclass(frozen=True)
class Tasks:
    """Names of lm-eval's tasks; questions of each at most; a folder with tasks of the user's own."""

    names: tuple[str, ...] = ()
    limit: int | None = None
    folder: Path | None = None


def check_tasks(tasks: Tasks) -> None:
    """InputError where lm-eval is wanted and missing, before a model is loaded."""
    if tasks.names and importlib.util.find_spec("lm_eval") is None:
        raise InputError("Benchmarks need the package lm-eval; install it with pip install 'abliterate[eval]'.")
    if tasks.folder is not None and not tasks.folder.is_dir():
        raise InputError(f"There is no folder {tasks.folder} with tasks; name one with --benchmark-path.")


def run_tasks(
    context: Context, base: Side, candidate: Side, tokenizer: PreTrainedTokenizerBase, tasks: Tasks
) -> list[dict[str, Any]]:
    """[{task, metric, higher_is_better, base, candidate: {value, stderr}}] of all tasks; nothing where none is named.

    Raises:
        InputError: no such task, or its data can't be loaded.
    """
    if not tasks.names:
        return []
    found = []
    for name, side in (("base", base), ("candidate", candidate)):
        with context.result.stage("benchmarks", f"{name}: {', '.join(tasks.names)}"), side.active():
            found.append(_results(side, tokenizer, tasks))
        context.check()
    return table(*found)


def table(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of what lm-eval returns of both models: every number of every task, as `metric,filter`."""
    rows = []
    for task, metrics in base["results"].items():
        better = base.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, _ = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool) or "," not in key:
                continue
            both = {name: _value(one["results"][task], key) for name, one in (("base", base), ("candidate", candidate))}
            name = key.removesuffix(",none").replace(",", " ")
            rows.append({"task": task, "metric": name, "higher_is_better": better.get(metric), **both})
    return rows


def _value(metrics: Mapping[str, Any], key: str) -> dict[str, float | None]:
    metric, _, chosen = key.partition(",")
    error = metrics.get(f"{metric}_stderr,{chosen}")
    return {"value": float(metrics[key]), "stderr": float(error) if isinstance(error, int | float) else None}


def _results(side: Side, tokenizer: PreTrainedTokenizerBase, tasks: Tasks) -> Mapping[str, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-eval can't be imported ({error}); install it with pip install 'abliterate[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    engine = side.engine
    try:
        model = HFLM(
            pretrained=engine.model, tokenizer=tokenizer, batch_size=engine.sizes.prefill, device=str(engine.chat.device)
        )
        manager = TaskManager(include_path=str(tasks.folder) if tasks.folder else None)
        # Bootstrapped errors of exotic metrics take minutes; means have closed forms, which are kept.
        results = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks.names), limit=tasks.limit, task_manager=manager, bootstrap_iters=0, log_samples=False
        )
    except Exception as error:  # the harness loads data sets and runs code of tasks: all mean that there is no result
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"lm-eval can't run {', '.join(tasks.names)}: {first}; see lm-eval ls tasks for names.") from error
    assert results is not None
    return results
