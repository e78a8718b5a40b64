"""The engine checks itself on a few prompts, under an edit, against `generate` and against the plain full sequence.

The comparison is teacher-forced: two correct ways may choose different tokens where two are nearly equal, and would then
differ in everything that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from abliterate.engine.prefill import EditState
from abliterate.engine.reference import Progress, ReferenceEngine
from abliterate.engine.trial_engine import PACING, Pacing, TrialEngine, Unsupported
from abliterate.errors import TrialError, first_line
from abliterate.model.memory import clear_device_cache, memory_errors
from abliterate.scorers.base import EarlyScorer
from abliterate.settings.schema import EfficiencySettings
from abliterate.types import Prompt

Engine = TrialEngine | ReferenceEngine
TOKENS = 8
ROWS = 4
# An unknown model's code may fail in any way on the engine's paths, while plain passes still work; if those fail, too, they say
# what is wrong with the model.
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)


@dataclass(frozen=True)
class EngineSetup:
    """Everything an engine is made of and prepared with; it may keep `budget_bytes` of the base model's states."""

    reference: ReferenceEngine
    layers: torch.nn.ModuleList
    edits: EditState
    early: EarlyScorer | None
    harmful: Sequence[Prompt]
    harmless: Sequence[Prompt]
    resume_layers: Sequence[int]
    budget_bytes: float = inf
    pacing: Pacing = PACING
    progress: Progress = lambda done, total: None

    def engine(self, switches: EfficiencySettings) -> TrialEngine:
        """A prepared engine; the model must carry no edit."""
        engine = TrialEngine(self.reference, self.layers, self.edits, switches, self.early, self.pacing)
        engine.prepare(self.harmful, self.harmless, self.resume_layers, self.budget_bytes, self.progress)
        return engine


@dataclass(frozen=True)
class Verdict:
    """The largest expected difference of log-probabilities between engine and reference, and the allowed difference.

    `noise` is the same difference between the reference with pads and without; it is `doubtful` if rounding can't explain it.
    """

    difference: float
    allowed: float
    noise: float
    doubtful: bool

    @property
    def ok(self) -> bool:
        """Whether the engine gives the reference's numbers."""
        return self.difference <= self.allowed


def trusted_engine(
    setup: EngineSetup,
    switches: EfficiencySettings,
    edited: Callable[[], None],
    clear: Callable[[], None],
    warn: Callable[[str], None],
) -> Engine:
    """The fastest engine that agrees with the reference under the edit that `edited` makes and `clear` undoes.

    Mechanisms that could change the numbers are left out one after the other, each with a warning; the last resort is the
    reference itself.
    """
    if not switches.use_trial_engine:
        return setup.reference
    for attempt, without in _attempts(switches):
        clear()
        engine: TrialEngine | None = None
        try:
            engine = setup.engine(attempt)
            edited()
            verdict = check(engine, setup)
            fault = (
                ""
                if verdict.ok
                else f"differs from the reference by {verdict.difference:.1e} ({verdict.allowed:.1e} is allowed)"
            )
        except Unsupported as error:  # leaving mechanisms out wouldn't help
            warn(f"The trial engine can't be used: {error}.")
            break
        except (TrialError, *FAULTS) as error:
            fault = f"fails ({type(error).__name__}: {first_line(error)})"
        finally:
            clear()
        if engine is not None and not fault:
            if verdict.doubtful:
                warn(
                    f"The model's own answers depend on how prompts are padded (by {verdict.noise:.1e}), so scores depend on "
                    "the batch size; give prompts of similar lengths, or --batch-size 1."
                )
            return engine
        engine = None
        clear_device_cache(setup.reference.chat.device)  # the kept states may be the reason for running out of memory
        warn(f"The trial engine{without} {fault}; a slower way is tried.")
    warn("Trials are evaluated by the reference, which is slower and gives the same numbers.")
    return setup.reference


# The mechanisms that could change the numbers, with the names that a user reads, in the order in which they are left out.
# The static cache, drafts and a shared prefix all need a cache whose columns may be masked anywhere.
_STATIC = "use_static_cache"
_DOUBTFUL = {
    _STATIC: "the static cache",
    "use_drafts": "drafts",
    "use_shared_prefix": "the shared prefix",
    "use_layer_skip": "layer skip",
}
_LEFT_OUT = (
    (_STATIC,),
    (_STATIC, "use_drafts"),
    (_STATIC, "use_drafts", "use_shared_prefix"),
    (_STATIC, "use_layer_skip"),
    tuple(_DOUBTFUL),
)


def _attempts(switches: EfficiencySettings) -> Iterable[tuple[EfficiencySettings, str]]:
    tried = {frozenset[str]()}
    yield switches, ""
    for names in _LEFT_OUT:
        off = frozenset(name for name in names if getattr(switches, name))
        if off not in tried:
            tried.add(off)
            without = " and ".join(_DOUBTFUL[name] for name in names if name in off)
            yield switches.model_copy(update=dict.fromkeys(off, False)), f" without {without}"


@torch.inference_mode()
def check(engine: TrialEngine, setup: EngineSetup) -> Verdict:
    """Compare on a few short and long prompts of each set; they are split if they don't fit into memory together."""
    chat = setup.reference.chat
    harmful, harmless = (
        spread([len(chat.token_ids(prompt)) for prompt in prompts]) for prompts in (setup.harmful, setup.harmless)
    )
    dtype, difference, noise = _apart(chat.device, lambda rows: _compare_responses(engine, setup, rows), harmful)
    _, first, _ = _apart(chat.device, lambda rows: _compare_first(engine, setup, rows), harmless)
    # The floor is rounding on the way through the layers; a mistake gives differences of order 0.1 to 10. The noise is bounded,
    # because a reference that contradicts itself would let anything pass.
    floor, ceiling = (1e-4, 1e-3) if dtype == torch.float32 else (8 * torch.finfo(dtype).eps, 0.3)
    return Verdict(max(difference, first), min(max(3 * noise, floor), ceiling), noise, 3 * noise > ceiling)


# The dtype of the logits, the engine's difference from the reference, and the reference's own between pads and no pads.
Compared = tuple[torch.dtype, float, float]


def _apart(device: torch.device, compare: Callable[[list[int]], Compared], rows: list[int]) -> Compared:
    """The worst result of `compare`, on all rows at once or, if memory doesn't allow that, on each half of them."""
    compared: Compared | None = None
    try:
        with memory_errors():
            compared = compare(rows)
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    # Outside the `except` block: inside it the traceback keeps the rows' tensors alive.
    if compared is not None:
        return compared
    clear_device_cache(device)
    half = len(rows) // 2
    dtypes, differences, noises = zip(
        *(_apart(device, compare, half_rows) for half_rows in (rows[:half], rows[half:])), strict=True
    )
    return dtypes[0], max(differences), max(noises)


def _compare_responses(engine: TrialEngine, setup: EngineSetup, rows: list[int]) -> Compared:
    reference = setup.reference
    prompts = [setup.harmful[row] for row in rows]
    # No row is fed further than a response may be, where a table of positions may end; a wrong draft follows the last token.
    tokens, expected = reference.raw_logits(prompts, max(2, min(TOKENS, reference.max_new_tokens - 2)))
    ends_at_once = tokens.shape[1] == 1  # every row; a second token, whatever it is, lets both halves be compared
    tokens = tokens.repeat(1, 2) if ends_at_once else tokens
    plain = torch.stack([_plain_logits(reference, prompt, row) for prompt, row in zip(prompts, tokens, strict=True)])
    expected = plain if ends_at_once else expected
    cut = tokens.shape[1] // 2
    apart, together = engine.forced_logits(setup.harmful, rows, tokens)
    difference = max(distance(expected[:, :cut], apart), distance(expected[-len(together) :, cut:], together))
    return apart.dtype, difference, distance(expected, plain)


def _compare_first(engine: TrialEngine, setup: EngineSetup, rows: list[int]) -> Compared:
    expected = setup.reference.first_logprobs([setup.harmless[row] for row in rows])
    return expected.dtype, distance(expected, engine.some_first_logprobs(setup.harmless, rows)), 0.0


def distance(expected: Tensor, actual: Tensor) -> float:
    """The largest Σ p |log p − log q| over rows (…, vocabulary) of logits: the expected difference of log-probabilities."""
    p, q = (logits.float().log_softmax(dim=-1) for logits in (expected, actual))
    terms = torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q).abs())
    worst = terms.sum(dim=-1).max()
    return float(worst) if torch.isfinite(worst) else float("inf")


def _plain_logits(reference: ReferenceEngine, prompt: Prompt, tokens: Tensor) -> Tensor:
    """The logits (T, vocabulary) of one row, fed as a whole sequence without pads and cache."""
    ids = torch.tensor([reference.chat.token_ids(prompt)], device=tokens.device)
    whole = torch.cat([ids, tokens[None, :-1]], dim=1)
    logits: Tensor = reference.model(input_ids=whole, use_cache=False).logits
    return logits[0, -len(tokens) :]


def spread(lengths: Sequence[int]) -> list[int]:
    """A few rows from the shortest to the longest prompt, in even steps."""
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
    count = min(ROWS, len(rows))
    return [rows[round(step * (len(rows) - 1) / max(1, count - 1))] for step in range(count)]
