"""The workbench: a loaded model with its prompts, engines and scorers, ready to be measured under edits.

    with load(settings) as bench:
        directions = find_directions(bench)
        with bench.edited(params):
            bench.respond(["Show me …"])

The model is the base model at every moment outside `edited`, bit for bit, and whatever measures the base does so inside `base`,
which fails loudly if an edit is on.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Environment, ModelRecord
from abliterate.directions import Directions
from abliterate.edits import SvdMemo, edit_method
from abliterate.engine.prefill import resume_layers
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.self_check import Engine, EngineSetup, trusted_engine
from abliterate.engine.trial_engine import TrialEngine
from abliterate.errors import AbliterateError, InputError
from abliterate.evaluation.likelihood import AskedBase
from abliterate.evaluation.teacher_forced import ModelView, may_share
from abliterate.evaluation.trial import early_scorer
from abliterate.model import loader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.devices import choose_device, device_name
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel
from abliterate.model.threads import THREADS
from abliterate.objectives import DEFAULT
from abliterate.pipeline import batch_size
from abliterate.pipeline.cache_keys import rendering, study_identity
from abliterate.pipeline.calibrate import choose_threads, known_prefix
from abliterate.pipeline.context import Context, read_prompts, unedited_errors
from abliterate.pipeline.from_settings import (
    asked_for,
    at_a_moment,
    chat_of,
    make_engine,
    objectives_of,
    plain_engine,
    scorers_of,
)
from abliterate.pipeline.lengths import check_lengths, named_sets
from abliterate.pipeline.preflight import check_loaded, check_model, check_names, with_edit_mode
from abliterate.pipeline.requirements import describe
from abliterate.pipeline.yardstick import find_yardstick, yardstick_prompts
from abliterate.prompts.sets import HeldoutSets, PromptSets
from abliterate.scorers import Scorer
from abliterate.scorers.yardstick import Yardstick
from abliterate.search.space import Space
from abliterate.settings.schema import Settings
from abliterate.terminal.progress_bar import default_reporter
from abliterate.types import Baseline, BatchSizes, Objective, Params, Prompt, Reporter

# The attributes that hold the model, which a closed workbench doesn't have.
_FREED = ("loaded", "chat", "plain", "engine", "scorers")
_SAMPLES = 256  # random trials that decide at which layers trials can resume


class Workbench:
    """A loaded model, which `calibrate` calibrates on prompts, and `prepare` makes ready for edits along directions.

    `plain` generates whole responses by `generate`. `engine` measures trials: it is the fast engine once `prepare` has
    checked it against `plain`, and `plain` until then. `baseline` holds the base model's scores once they were measured, and
    `yardstick` its measures of its own answers once a scorer has asked for them. `refined` keeps the directions of refined
    trials: in memory, or in the directory of the run whose trials are measured. `prior` are weights of the layers for the
    search's start-up trials, where it has them. `own_answers` are ids of the base's answers along which inputs of modules were
    captured. `time_told` is whether a person knows how long a run takes.
    """

    def __init__(
        self, context: Context, loaded: LoadedModel, coverage: Mapping[str, Any] | None = None, *, time_told: bool = False
    ) -> None:
        self.context = context
        self.loaded = loaded
        self.coverage, self.time_told = coverage, time_told
        self.scorers: tuple[Scorer, ...] = ()
        self.objectives: tuple[Objective, ...] = DEFAULT
        self.refined = RefinedStore()
        self.use(BatchSizes.same(1), "")
        self._prompts: PromptSets | None = None
        self._editor: Editor | None = None
        self._prepared = False
        self._measured: tuple[str, int] | None = None  # what the model is measured as, and by which thread
        self.baseline: Baseline | None = None
        self.yardstick: Yardstick | None = None
        self.prior: tuple[float, ...] = ()
        self.own_answers: Sequence[Sequence[int]] = ()

    def use(self, sizes: BatchSizes, prefix: str) -> None:
        """Make the plain engine for these batch sizes and for responses that begin with `prefix`."""
        self.sizes, self.response_prefix = sizes, prefix
        self.chat: PromptEncoder = chat_of(self.settings, self.loaded.tokenizer, self.loaded.device, prefix)
        self.plain: ReferenceEngine = make_engine(self.context, self.loaded.model, self.chat, sizes)
        self.engine: Engine = self.plain
        self._prepared = False

    @property
    def settings(self) -> Settings:
        """The settings that the workbench was made with."""
        return self.context.settings

    @property
    def prompts(self) -> PromptSets:
        """The prompt sets that the workbench is calibrated on."""
        if self._prompts is None:
            raise AbliterateError("The workbench has no prompts yet; call calibrate, or make it by load.")
        return self._prompts

    @property
    def editor(self) -> Editor:
        """The editor, which applies a trial's parameters to the model."""
        if self._editor is None:
            raise AbliterateError("The workbench has no directions yet; call find_directions, or search with your own.")
        return self._editor

    @property
    def directions(self) -> Directions | None:
        """The directions that the workbench is prepared for; None before `prepare`."""
        return None if self._editor is None else self._editor.directions

    @property
    def space(self) -> Space:
        """The search space over the components that the model has."""
        components = tuple(dict.fromkeys(target.component for target in self.loaded.targets))
        coeffs = getattr(edit_method(self.settings.edit.mode), "coeffs", None)
        sizes, extra = (self.loaded.info.n_layers, components), asked_for(self.settings)
        return Space(self.settings.search, *sizes, self.objectives, extra, self.prior, coeffs)

    def fault(self, params: Params) -> str:
        """Why parameters can't be of the workbench's model, as in `TrialParams.fault`; "" if they can."""
        targets = self.loaded.targets
        components, modules = {target.component for target in targets}, {target.name for target in targets}
        return params.fault(self.loaded.info.n_layers, components, modules)

    def calibrate(self, prompts: PromptSets, prefix: str | None = None, sizes: Mapping[str, int] | None = None) -> None:
        """Warm the model up once, and find the batch sizes and the response prefix unless they are known.

        `prefix` and `sizes` ({operation: batch size}) are given by a run to its workers, or by a recipe.
        """
        with self.context.stage("calibrate"), self.base(), unedited_errors():
            plain = plain_engine(self.context, self.loaded)
            choose_threads(plain, prompts, self.context.reporter.note)  # before the batch sizes, which depend on it
            tuned = batch_size.batch_sizes(self.context, self.loaded, plain, prompts, sizes)
            if prefix is None:
                prefix = known_prefix(self.context, self.loaded, tuned, prompts)
        self._forget_edits()  # the trial engine and the scorers know the prompts of before
        self._prompts, self.baseline, self.yardstick, self.prior = prompts, None, None, ()
        self.use(tuned, prefix)

    def note_forms(self) -> None:
        """Report how the chat template changes prompts whose form it can't keep."""
        for note in dict.fromkeys(self.chat.form(prompt).note for each in self.prompts.all_sets() for prompt in each):
            if note:
                self.context.reporter.note(note)

    def make_edits(self, directions: Directions, *, now: bool = True) -> None:
        """Put hooks on every target, and prepare edits along `directions`: all `now`, or each when it is first used."""
        self._forget_edits()
        efficiency = self.settings.efficiency
        hooks = EditHooks(self.loaded.targets, incremental=efficiency.use_incremental_adapter_updates)
        memo = SvdMemo(efficiency.max_svd_cache_size if efficiency.enable_svd_cache else 0)
        budget = efficiency.max_kept_mb * 2**20
        editor = Editor(
            self.loaded.targets,
            directions,
            self.settings.edit,
            hooks,
            memo,
            budget,
            # Of the store that the workbench has when they are needed, as a run sets its own.
            refined=lambda params: self.refined.directions(params),
        )
        reporter = self.context.reporter
        self._editor = editor
        if not now:
            return
        with self.context.stage("prepare edits", self.settings.edit.mode):
            editor.prepare(lambda done, total: reporter.progress(done, total, "modules"))
            self._note_unedited(editor.unedited)
            for names, how in ((editor.offloaded, "kept in main memory"), (editor.unprepared, "prepared again in each trial")):
                if names:
                    reporter.note(f"the edits of {len(names)} modules are {how} (efficiency.max_kept_mb)")

    def _note_unedited(self, names: Sequence[str]) -> None:
        """Report the modules whose inputs allow no edit.

        Raises:
            InputError: these are all modules.
        """
        why, mode = "their inputs on harmful prompts hold nothing that other inputs lack", self.settings.edit.mode
        if len(names) == len(self.loaded.targets):
            raise InputError(
                f"The edit mode {mode!r} can edit no module, because {why}; give other prompts, fewer of them with "
                "--set edit.capture_prompts, or choose another --set edit.mode."
            )
        if names:
            self.context.reporter.note(f"{len(names)} modules stay unedited, because {why}")

    def prepare(self, directions: Directions) -> None:
        """Make edits along `directions` possible, and choose the fastest trial engine that agrees with `plain`."""
        if self._prepared and self.directions is directions:
            return
        self.make_edits(directions)
        editor, space, context = self.editor, self.space, self.context
        setup = EngineSetup(
            self.plain,
            self.loaded.layers,
            editor.hooks,
            early_scorer(self.scorers),
            self.prompts.harmful_eval,
            self.prompts.harmless_eval,
            # The layers at which trials are likely to resume.
            resume_layers(editor.first_layers(space.samples(_SAMPLES, seed=0))),
            editor.budget_bytes,  # the budget that prepared edits leave
            progress=lambda done, total: context.reporter.progress(done, total, "prompts"),
        )
        with context.stage("trial engine"), self._measuring("the self-check's model"):
            edit = partial(editor.apply_exactly, space.upper_half())  # lower layers stay as they are
            switches = self.settings.efficiency
            self.engine = trusted_engine(setup, switches, edit, editor.clear, context.reporter.warn)
            for note in _left_out(self.engine, setup, self.settings):
                context.reporter.note(note)
        self._prepared = True

    def renew_batch_sizes(self) -> None:
        """After trials: have the next run find batch sizes anew, if theirs were found while the machine was busy."""
        speed = getattr(self.engine, "decode_speed", 0.0)
        if speed and not self.settings.evaluation.batch_size:
            # The sizes were found before the response prefix was known, which makes prompts longer.
            batch_size.renew_if_slow(self.context, self.loaded, plain_engine(self.context, self.loaded), self.prompts, speed)

    def _forget_edits(self) -> None:
        """Take earlier hooks off, and with them the engine that was made for them.

        Raises:
            RuntimeError: the model is being measured.
        """
        if self._measured:
            raise RuntimeError(f"the edits can't be changed while the model is measured as {self._measured[0]}")
        if self._editor is not None:
            self._editor.clear()
        self._editor, self.engine, self._prepared = None, self.plain, False

    @contextlib.contextmanager
    def edited(self, params: Params) -> Iterator[None]:
        """Apply a trial's edits for the `with` block; afterwards the model is always the base model again."""
        editor = self.editor
        with self._measuring("edited"):
            try:
                editor.apply(params)
                yield
            finally:
                editor.suspend()

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Guard passes that put edits of their own on the model by `editor.hooks`; afterwards it is the base model again."""
        with self._measuring("learning"):
            hooks = self.editor.hooks
            counts = hooks.hits, hooks.misses
            try:
                yield
            finally:
                self.editor.clear()
                hooks.hits, hooks.misses = counts  # they are those of trials

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Guard a measurement of the base model: every such measurement is made inside this `with` block.

        Raises:
            RuntimeError: the model is edited, which is the caller's mistake and would silently falsify the figures.
        """
        with self._measuring("base"):
            if self._editor is not None and self._editor.hooks.active:
                raise RuntimeError("an edit is on the model that is to be measured as the base")
            yield

    @contextlib.contextmanager
    def _measuring(self, state: str) -> Iterator[None]:
        if self._measured:
            raise RuntimeError(f"the model can't be measured as {state} while it is measured as {self._measured[0]}")
        self._measured = (state, threading.get_ident())
        try:
            yield
        finally:
            self._measured = None

    def asked(self, model: ModelView | None = None) -> AskedBase:
        """The unedited model, for scorers that ask it about responses; `model` is another view of it than this workbench's."""
        harmless = yardstick_prompts(self.prompts.harmless)
        return AskedBase(model or ModelView(self.plain, self.base, may_share(self.engine)), harmless, self._find_yardstick)

    def _find_yardstick(self, base: AskedBase) -> Yardstick:
        if self.yardstick is None:
            # The trial engine knows this workbench's view of the model, and no other.
            engine = self.engine if base.model.engine is self.plain else base.model.engine
            self.yardstick = find_yardstick(self.context, self.loaded, self.chat, base, engine)
        return self.yardstick

    def respond(self, prompts: Sequence[str | Prompt]) -> list[str]:
        """Whole responses of the base model, or inside `edited` of the edited model.

        Raises:
            TrialError: the device is too small for one prompt, or the model's logits are not numbers.
            RuntimeError: something else is measuring the model, in this thread or another one.
        """
        system = self.settings.prompts.system
        given = [prompt if isinstance(prompt, Prompt) else Prompt(prompt, system) for prompt in prompts]
        inside = self._measured in {(state, threading.get_ident()) for state in ("base", "edited")}
        with contextlib.nullcontext() if inside else self.base():
            responses = self.plain.respond(given)
        assert responses is not None  # only a limit can stop it
        return [response.text for response in responses]

    def identity(self, settings: Settings | None = None, objectives: Sequence[Objective] | None = None) -> dict[str, str]:
        """Hashes, by part, of everything that a trial's meaning depends on; by default under the workbench's settings."""
        sets = self.prompts.all_sets()
        protected = tuple(self.prompts.protected.values())
        return study_identity(settings or self.settings, self.loaded, self.chat, sets, objectives or self.objectives, protected)

    def record(self) -> dict[str, Any]:
        """The fields of `Result` that describe the model and its calibration."""
        return {
            "model": ModelRecord.of(self.loaded.info),
            "environment": Environment.here(device_name(choose_device(self.settings.device))),
            "coverage": self.coverage,
            "batch_sizes": self.sizes.by_name,
            "response_prefix": self.response_prefix,
            "rendering": rendering(self.settings, self.loaded),
        }

    def caches(self) -> dict[str, dict[str, int]]:
        """{cache: hits and misses} so far."""
        editor = self.editor
        return {
            "residuals": dict(self.context.store.counts("residuals")),
            "svd": {"hits": editor.memo.hits, "misses": editor.memo.misses},
            "adapters": {"hits": editor.hooks.hits, "misses": editor.hooks.misses},
        }

    def close(self) -> None:
        """Remove all edits and drop the model, which frees its memory; the workbench can't be used afterwards."""
        if self._editor is not None:
            self._editor.clear()
        for name in _FREED:
            self.__dict__.pop(name, None)
        self._editor = None
        gc.collect()

    if not TYPE_CHECKING:  # or a type checker would take every name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name in _FREED:
                raise AbliterateError("The workbench is closed, and its model is gone; load the model again.")
            raise AttributeError(name)

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load(settings: Settings, reporter: Reporter | None = None, *, check: Callable[[], None] = lambda: None) -> Workbench:
    """Load, check and calibrate the settings' model and prompts: a workbench to be used in a `with` statement.

    `reporter` shows the progress; by default it is a progress bar on standard error.

    Raises:
        InputError: a name in the settings is unknown, the model or a prompt set can't be loaded, or too little of the
            model can be edited. AbliterateError: the model can't be used.
    """
    reporter = reporter or default_reporter()
    settings = with_edit_mode(settings, reporter.note)
    check_names(settings)
    context = Context.of(settings, reporter, check)
    check_model(settings)
    return load_calibrated(context, read_prompts(context))


def load_calibrated(
    context: Context,
    prompts: PromptSets,
    prefix: str | None = None,
    sizes: Mapping[str, int] | None = None,
    held: HeldoutSets | None = None,
) -> Workbench:
    """A workbench that is calibrated on `prompts`; `prefix` and `sizes` are as in `Workbench.calibrate`.

    The lengths of the `held` prompts are checked, too.
    """
    scorers = scorers_of(context.settings)
    objectives = objectives_of(context.settings, scorers)
    sets = named_sets(prompts, held)
    bench = open_workbench(context, prompts, sets)
    try:
        check_loaded(context, bench.loaded)
        bench.scorers, bench.objectives = scorers, objectives
        bench.calibrate(prompts, prefix, sizes)
        if bench.response_prefix:  # it makes every prompt longer; the warning has been given
            check_lengths(bench.settings, bench.loaded.model.config, bench.chat, sets, lambda text: None)
        bench.note_forms()
    except BaseException:  # in a notebook the traceback would keep the model
        bench.close()
        raise
    return bench


def open_workbench(
    context: Context, prompts: PromptSets | None = None, sets: Mapping[str, Sequence[Prompt]] | None = None
) -> Workbench:
    """A workbench with a loaded model that isn't calibrated yet; given `prompts`, the needs of a run on them are shown.

    The lengths of the prompts in `sets`, by default those of `prompts`, are checked before weights are read.
    If the chat template writes the date, the workbench's settings have the moment at which it renders; they have an edit mode
    in place of "auto".
    """
    context = context.with_settings(with_edit_mode(context.settings))  # evaluate and tune-batch give settings of their own
    settings = context.settings
    device = choose_device(settings.device)
    if device.type == "cpu":
        THREADS.fit(context.reporter.note)
    coverage: Mapping[str, Any] | None = None
    time_told = False
    probe, checked = probe_inputs(settings), named_sets(prompts) if sets is None else sets

    def inputs(tokenizer: PreTrainedTokenizerBase, at: torch.device) -> BatchEncoding:
        config = loader.load_config(loader.resolve_source(settings.model), settings.load)
        check_lengths(settings, config, chat_of(settings, tokenizer, at), checked, context.reporter.warn)
        return probe(tokenizer, at)

    with context.stage("load", loader.public_name(settings.model), at_once=True):
        loaded = loader.load_model(settings.model, settings.load, device, inputs, context.reporter.warn)
        context = context.with_settings(at_a_moment(settings, loaded.tokenizer))
        if prompts is not None:
            coverage, time_told = describe(context, loaded, device, prompts)
    return Workbench(context, loaded, coverage, time_told=time_told)


def probe_inputs(settings: Settings) -> Callable[[PreTrainedTokenizerBase, torch.device], BatchEncoding]:
    """A function that gives the input of the loader's test generation."""
    probe = Prompt("What is 1+1?", settings.prompts.system)

    def inputs(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> BatchEncoding:
        return chat_of(settings, tokenizer, device).encode([probe])

    return inputs


def rename_model(bench: Workbench, model: str, revision: str) -> None:
    """Rename the model in all records, because a directory has another name on each machine."""
    bench.loaded = replace(bench.loaded, info=replace(bench.loaded.info, id=model, revision=revision))


def _left_out(engine: Engine, setup: EngineSetup, settings: Settings) -> Iterator[str]:
    """Notes on the shortcuts that this model or these scorers don't allow the engine."""
    if not isinstance(engine, TrialEngine):
        return
    if settings.efficiency.use_shared_prefix and engine.sharing == "none":
        yield "the model's states can't be cut, so prompts share no prefix"
    if engine.static:
        yield "responses are decoded in a static cache, so they aren't drafted"
    elif settings.efficiency.use_drafts and not engine.drafting:
        yield "this model allows no holes in its cache, so responses aren't drafted"
    if setup.early is None:
        yield "a scorer needs whole responses, so no response and no trial ends early"
    yield from engine.left_out.values()
