"""Standard benchmarks through lm-eval (the extra `eval`): base against candidate, one row a metric. Only if asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
    with context.result.stage("benchmarks", ", ".join(tasks.names)):
        with _sentences(tasks):
            manager = _manager(tasks)  # reads every task's file: once for both
        found = []
        for side in (base, candidate):
            with side.active(), _sentences(tasks):
                found.append(_results(side, tokenizer, tasks, manager))
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


def _manager(tasks: Tasks) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-eval can't be imported ({error}); install it with pip install 'abliterate[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(tasks.folder) if tasks.folder else None)


def _results(side: Side, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, manager: Any) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    engine = side.engine
    model = HFLM(pretrained=engine.model, tokenizer=tokenizer, batch_size=engine.sizes.prefill, device=str(engine.chat.device))
    # Bootstrapped errors of exotic metrics take minutes; means have closed forms, which are kept.
    results = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks.names), limit=tasks.limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert results is not None
    return results


@contextlib.contextmanager
def _sentences(tasks: Tasks) -> Iterator[None]:
    """The harness loads data sets and runs code of tasks; whatever it raises means that there is no result."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"lm-eval can't run {', '.join(tasks.names)}: {first}; lm-eval ls tasks shows names.") from error
