"""Standard benchmarks through lm-eval (the extra `eval`): base against candidate, one row a metric. Only if asked for."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from abliterate.errors import InputError, Interrupted
from abliterate.evaluation.teacher_forced import ModelView


@dataclass(frozen=True)
class Tasks:
    """Names of lm-eval's tasks; questions of each at most; a folder with tasks of the user's own."""

    names: tuple[str, ...] = ()
    limit: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Ready:
    """Tasks that lm-eval knows, and what it knows them by."""

    names: tuple[str, ...]
    limit: int | None
    manager: Any


def check_tasks(tasks: Tasks) -> Ready | None:
    """The tasks, looked up before a model is loaded; None where none is named.

    Raises:
        InputError: lm-eval is missing, can't read its tasks, or knows none of such a name.
    """
    if tasks.folder is not None and not tasks.folder.is_dir():
        raise InputError(f"There is no folder {tasks.folder} with tasks; name one with --benchmark-path.")
    if not tasks.names:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("Benchmarks need the package lm-eval; install it with pip install 'abliterate[eval]'.")
    found: dict[str, None] = {}
    try:
        manager = _manager(tasks)  # reads every task's file: once for both models
        for name in tasks.names:
            matching = manager.match_tasks([name])  # a name may hold wildcards
            if not matching:
                raise InputError(f"lm-eval has no task {name!r}; lm-eval ls tasks shows names.")
            found |= dict.fromkeys(matching)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"lm-eval can't read its tasks: {_first_line(error)}; check --benchmark-path.") from error
    return Ready(tuple(found), tasks.limit, manager)


def run_tasks(
    base: ModelView,
    candidate: ModelView,
    tokenizer: PreTrainedTokenizerBase,
    ready: Ready,
    warn: Callable[[str], None],
    check: Callable[[], None],
) -> tuple[list[dict[str, Any]], str]:
    """[{task, metric, higher_is_better, base, candidate: {value, stderr}}] of all tasks, and why there are none, or "".

    A failure is a warning: the harness loads data sets and runs the code of tasks, and other things were measured by then.
    """
    results = []
    try:
        for view in (base, candidate):
            with view.active():
                results.append(_results(view, tokenizer, ready))
            check()
        return table(*results), ""
    except Interrupted:
        raise
    except Exception as error:
        reason = f"lm-eval can't run {', '.join(ready.names)}: {_first_line(error)}"
        warn(f"{reason}; what was measured on held-out prompts stands.")
        return [], reason


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


def _results(side: ModelView, tokenizer: PreTrainedTokenizerBase, ready: Ready) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    engine = side.engine
    model = HFLM(pretrained=engine.model, tokenizer=tokenizer, batch_size=engine.sizes.prefill, device=str(engine.chat.device))
    # Bootstrapped errors of exotic metrics take minutes; means have closed forms, which are kept.
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(ready.names),
        limit=ready.limit,
        task_manager=ready.manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results is not None
    return results


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
