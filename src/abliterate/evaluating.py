"""`abliterate evaluate`: any candidate against its base on held-out prompts, and on tasks of lm-eval if asked for.

A candidate is a model of its own, an adapter on the base, or a trial of a run; the two latter share the base's weights, so only
a model of its own needs memory for both.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from abliterate import stages, tuning
from abliterate.bench import Bench, Calibration, chat_of, known_prefix, load, make_engine, plain_engine, scorers_of
from abliterate.benchmarks import Tasks, check_tasks, run_tasks
from abliterate.errors import AbliterateError, InputError, TrialError
from abliterate.evaluation.forced import Side
from abliterate.heldout import Heldout, against_search, edited_sides, measured, read_heldout
from abliterate.inputs import Context, PromptSets, prompt_sources, read_prompts
from abliterate.inspection import check_model
from abliterate.model import loader
from abliterate.model.checkpoint import quiet_bitsandbytes
from abliterate.model.devices import choose_device
from abliterate.pipeline import make_store
from abliterate.results import RunResult
from abliterate.rundir import RunDirectory
from abliterate.settings import Settings
from abliterate.types import Baseline, Prompt, Reporter, Trial

Kind = Literal["model", "adapter", "trial"]


@dataclass(frozen=True)
class Candidate:
    """What is measured: a directory or Hub id, or a run's directory and the number of its trial (None: the selected one)."""

    kind: Kind
    place: str
    number: int | None = None

    @property
    def name(self) -> str:
        """As it may appear in results."""
        name = loader.public_name(self.place) if self.kind != "trial" else Path(self.place).resolve().name
        return name if self.number is None else f"{name}:{self.number}"


def parse_candidate(text: str) -> Candidate:
    """A model directory or id, an adapter directory, RUN or RUN:N.

    Raises:
        InputError: nothing of these is there.
    """
    head, colon, tail = text.rpartition(":")
    if colon and tail.isdigit() and _is_run(Path(head)):
        return Candidate("trial", head, int(tail))
    path = Path(text).expanduser()
    if _is_run(path):
        return Candidate("trial", str(path))
    if (path / "adapter_config.json").is_file():
        return Candidate("adapter", str(path))
    loader.resolve_source(text)  # its sentences say what a path may be
    return Candidate("model", text)


def evaluate(
    settings: Settings,
    reporter: Reporter,
    candidate: Candidate,
    tasks: Tasks,
    *,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{base, candidate, heldout, benchmarks}: `heldout` as in a run's `result.json`.

    Raises:
        InputError: prompts, models or the run don't fit together. AbliterateError: the candidate's numbers are not finite.
    """
    scorers_of(settings, heldout=True)
    choose_device(settings.device)
    check_tasks(tasks)
    run = RunDirectory(Path(candidate.place)).read_result() if candidate.kind == "trial" else {}
    trial = _trial_of(run, candidate) if run else None
    context = Context(settings, reporter, RunResult(None, reporter), make_store(settings, reporter), check)
    check_model(settings, editing=False)
    prompts = _search_prompts(context, required=trial is not None)
    held = read_heldout(context, prompts.all_sets() if prompts else (), required=True)
    assert held is not None
    bench = _bench(context, prompts or _stand_in(held))
    try:
        with _sides(context, bench, candidate, run, trial) as (base, edited):
            with context.result.stage("held-out", f"{len(held.sets.harmful)} + {len(held.sets.harmless)} prompts"):
                found = measured(context, base, edited, held)
            benchmarks = run_tasks(context, base, edited, bench.loaded.tokenizer, tasks)
    except (TrialError, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise AbliterateError(f"The candidate can't be measured ({reason}); try a smaller --batch-size or --dtype.") from error
    number = None if trial is None else trial.number
    scores: dict[str, Any] = {}
    if trial is not None:
        baseline = Baseline.from_record(run["baseline"])
        scores = against_search(found, trial, baseline)
    heldout = {"trial": number, **found, "search": None, "optimism": None, **scores}
    return {"base": bench.loaded.info.id, "candidate": candidate.name, "heldout": heldout, "benchmarks": benchmarks}


def _is_run(path: Path) -> bool:
    directory = RunDirectory(path.expanduser())
    return directory.holds_run or directory.result.is_file()


def _trial_of(run: dict[str, Any], candidate: Candidate) -> Trial:
    number = run["selected"] if candidate.number is None else candidate.number
    if number is None:
        raise InputError(f"The run in {candidate.place} has chosen no trial yet; name one as {candidate.place}:N.")
    found = next((Trial.from_record(one) for one in run["trials"] if one["number"] == number), None)
    if found is None or found.state != "complete":
        raise InputError(
            f"The run in {candidate.place} has no complete trial {number}; see abliterate trials {candidate.place}."
        )
    return found


def _search_prompts(context: Context, *, required: bool) -> PromptSets | None:
    """The sets that directions and search use. Of default ones it is enough to say that they can't be compared with."""
    given = any(getattr(context.settings.prompts, name) for name in prompt_sources(context.settings))
    try:
        return read_prompts(context)
    except InputError as error:
        if required or given:
            raise
        context.reporter.warn(
            f"The held-out prompts aren't compared with those that directions and search use by default, which can't be "
            f"loaded: {error}"
        )
        return None


def _stand_in(held: Heldout) -> PromptSets:
    """What batch sizes and the response prefix are found with where there is nothing else."""
    return PromptSets(*(2 * (held.sets.harmful, held.sets.harmless)))


def _bench(context: Context, prompts: PromptSets) -> Bench:
    """The base model, calibrated as for a run; nothing of it is edited for good, so what could be edited isn't looked at."""
    loaded = load(context, None)
    with context.result.stage("calibrate"):
        sizes = tuning.batch_sizes(context, loaded, plain_engine(context, loaded), prompts)
        prefix = known_prefix(context, loaded, sizes, prompts)
    chat = chat_of(context.settings, loaded.tokenizer, loaded.device, prefix)
    return Bench(loaded, chat, make_engine(context, loaded.model, chat, sizes), (), Calibration(sizes, prefix))


@contextlib.contextmanager
def _sides(
    context: Context, bench: Bench, candidate: Candidate, run: dict[str, Any], trial: Trial | None
) -> Iterator[tuple[Side, Side]]:
    """Base and candidate, ready to be measured."""
    base = Side(make_engine(context, bench.loaded.model, bench.chat, bench.calibration.sizes), contextlib.nullcontext)
    if trial is not None:
        if bench.loaded.info.fingerprint != run["model"]["fingerprint"]:
            raise InputError(f"The run in {candidate.place} is of another model ({run['model']['id']}); give that one as BASE.")
        found = stages.read_directions(RunDirectory(Path(candidate.place)).directions, run)
        editor = stages.make_editor(context, bench, found)
        yield edited_sides(context, bench, editor, trial)
        editor.clear()
        return
    if candidate.kind == "adapter":
        with context.result.stage("load the adapter", candidate.name):
            peft = _with_adapter(bench, candidate.place)
        yield replace(base, active=peft.disable_adapter), base
        return
    settings = context.settings
    own = settings.load.model_copy(update={"revision": ""})
    other = load(replace(context, settings=settings.model_copy(update={"model": candidate.place, "load": own})), None)
    chat = chat_of(settings, other.tokenizer, other.device, bench.calibration.response_prefix)
    probe = Prompt("What is 1+1?", settings.prompts.system)
    sizes = [one.model.config.get_text_config().vocab_size for one in (bench.loaded, other)]
    if sizes[0] != sizes[1] or chat.token_ids(probe) != bench.chat.token_ids(probe):
        raise InputError(
            f"The model {candidate.name} reads prompts as other tokens than the base, so the two can't be compared token by "
            "token; give the base that it was made from."
        )
    yield base, Side(make_engine(context, other.model, chat, bench.calibration.sizes), contextlib.nullcontext)
    del other
    gc.collect()


def _with_adapter(bench: Bench, place: str) -> Any:
    """The base with a PEFT adapter on it; its own layers are wrapped in place."""
    quiet_bitsandbytes()
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return PeftModel.from_pretrained(bench.loaded.model, place).eval()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"The adapter in {place} doesn't fit the base: {first}; give the base that it was made from."
        ) from error
