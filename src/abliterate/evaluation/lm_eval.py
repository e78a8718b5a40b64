"""Run standard benchmarks through lm-eval (the extra `eval`) on base and candidate, if the user asks for them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from abliterate.errors import InputError, Interrupted, first_line, install_extra
from abliterate.evaluation.teacher_forced import ModelView


@dataclass(frozen=True)
class Tasks:
    """The requested lm-eval tasks: `names`, a `limit` of questions per task, and a `folder` with the user's own tasks."""

    names: tuple[str, ...] = ()
    limit: int | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Ready:
    """Tasks that lm-eval knows, and lm-eval's task manager."""

    names: tuple[str, ...]
    limit: int | None
    manager: Any


def check_tasks(tasks: Tasks) -> Ready | None:
    """The tasks, looked up before a model is loaded; None if no task is named.

    Raises:
        InputError: lm-eval is missing, can't read its tasks, or knows no task of a given name.
    """
    if tasks.folder is not None and not tasks.folder.is_dir():
        raise InputError(f"There is no folder {tasks.folder} with tasks; name a folder with --benchmark-path.")
    if not tasks.names:
        if tasks.limit or tasks.folder is not None:
            raise InputError("The options --benchmark-limit and --benchmark-path belong to --benchmark NAME; name one, too.")
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"Benchmarks need the package lm-eval; run {install_extra('eval')}.")
    task_names: dict[str, None] = {}
    try:
        manager = _manager(tasks)  # it reads every task's file, so it is made once for both models
        for name in tasks.names:
            matching = manager.match_tasks([name])  # a name may hold wildcards
            if not matching:
                raise InputError(f"lm-eval has no task {name!r}; list the names with lm-eval ls tasks.")
            task_names |= dict.fromkeys(matching)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"lm-eval can't read its tasks: {first_line(error)}; check --benchmark-path.") from error
    return Ready(tuple(task_names), tasks.limit, manager)


def run_tasks(
    base: ModelView,
    candidate: ModelView,
    tokenizer: PreTrainedTokenizerBase,
    ready: Ready,
    warn: Callable[[str], None],
    check: Callable[[], None],
) -> tuple[list[dict[str, Any]], str]:
    """[{task, metric, higher_is_better, base, candidate: {value, stderr}}] of all tasks, and the reason for a failure, or "".

    A failure is only a warning: the harness loads data sets and runs the tasks' code, and other figures are known by then.
    """
    results = []
    try:
        for model in (base, candidate):
            with model.active():
                results.append(_results(model, tokenizer, ready))
            check()
        return table(*results), ""
    except Interrupted:
        raise
    except Exception as error:
        reason = f"lm-eval can't run {', '.join(ready.names)}: {first_line(error)}"
        warn(f"{reason}; the figures for held-out prompts are kept.")
        return [], reason


def table(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for every number of every task, from lm-eval's results for both models, whose keys are `metric,filter`."""
    rows = []
    for task, metrics in base["results"].items():
        better = base.get("higher_is_better", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, _ = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool) or "," not in key:
                continue
            both = {name: _value(results["results"][task], key) for name, results in (("base", base), ("candidate", candidate))}
            name = key.removesuffix(",none").replace(",", " ")
            rows.append({"task": task, "metric": name, "higher_is_better": better.get(metric), **both})
    return rows


def _value(metrics: Mapping[str, Any], key: str) -> dict[str, float | None]:
    metric, _, filter_name = key.partition(",")
    error = metrics.get(f"{metric}_stderr,{filter_name}")
    return {"value": float(metrics[key]), "stderr": float(error) if isinstance(error, int | float) else None}


def _manager(tasks: Tasks) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"lm-eval can't be imported ({error}); run {install_extra('eval')}.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_path=str(tasks.folder) if tasks.folder else None)


def _results(side: ModelView, tokenizer: PreTrainedTokenizerBase, ready: Ready) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    engine = side.engine
    model = HFLM(pretrained=engine.model, tokenizer=tokenizer, batch_size=engine.sizes.prefill, device=str(engine.chat.device))
    # Bootstrapped errors of exotic metrics take minutes, so they are off; the errors of means have closed forms and stay.
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
