"""A tiny model with its reference engine, a trial engine and an editor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader
from abliterate.engine.self_check import EngineSetup, trusted_engine
from abliterate.engine.trial_engine import PACING, Pacing, TrialEngine
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel
from abliterate.model.thinking import Markup
from abliterate.scorers.base import EarlyScorer
from abliterate.scorers.kl import kl_divergence
from abliterate.scorers.refusals import normalize
from abliterate.settings.schema import EfficiencySettings, ResponseSettings
from abliterate.types import BatchSizes, Kernel, Prompt, TrialParams
from support.models import NAMED, make_chat, make_editor, make_loaded, make_model, make_params, make_tokenizer

BLOCKS, ANSWER_TAGS = ResponseSettings().thinking_blocks, ResponseSettings().answer_tags


def make_engine(model: PreTrainedModel, batch_size: int, max_new_tokens: int = 12) -> ReferenceEngine:
    """A reference engine with the default thinking blocks."""
    chat = make_chat()
    reader = ResponseReader(chat.tokenizer, Markup(BLOCKS, ANSWER_TAGS))
    return ReferenceEngine(model, chat, reader, max_new_tokens=max_new_tokens, sizes=BatchSizes.same(batch_size))


def reader() -> ResponseReader:
    """A reader with the demo's tokenizer."""
    return ResponseReader(make_tokenizer(), Markup(BLOCKS, ANSWER_TAGS))


SYSTEM = "You are a helpful assistant."
HARMFUL = tuple(
    Prompt(text, SYSTEM)
    for text in (
        "Hi",
        "Mangle the mailbox",
        "Tell me how to mangle the mailbox.",
        "Now",
        "How do I squash a very old hat at home?",
    )
)
HARMLESS = tuple(
    Prompt(text, SYSTEM) for text in ("Hello", "Write a short guide on how to rinse a carpet.", "Sing", "What now?")
)
TOKENS = 10
SHORT = Pacing(pause=4, pass_cost=64)
Observed = tuple[torch.Tensor, list[str]]


def no_progress(done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclasses.dataclass
class Lab:
    """A tiny model with its reference engine and an editor."""

    loaded: LoadedModel
    reference: ReferenceEngine
    editor: Editor
    pacing: Pacing = PACING
    _seen: dict[str, Observed] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def expected(self, params: TrialParams) -> Observed:
        """The reference's observation under an edit, computed once; the edit stays on."""
        self.editor.apply(params)
        key = repr(params)
        if key not in self._seen:
            self._seen[key] = whole(self.reference)
        return self._seen[key]

    def engine(self, early: EarlyScorer | None = None, **switches: bool) -> TrialEngine:
        """A prepared engine that can resume at every layer."""
        self.editor.clear()
        layers = self.loaded.layers
        setup = EngineSetup(
            self.reference, layers, self.editor.hooks, early, HARMFUL, HARMLESS, range(len(layers)), pacing=self.pacing
        )
        return setup.engine(EfficiencySettings(**switches))  # type: ignore[arg-type]


def make_lab(
    family: str,
    *,
    batch_size: int = 3,
    tokens: int = TOKENS,
    generation: dict[str, Any] | None = None,
    pacing: Pacing = PACING,
) -> Lab:
    """A lab around a random model of a family."""
    model = make_model(family)
    if generation:
        model.generation_config.update(**generation)  # type: ignore[union-attr]
    loaded = make_loaded(model, components=NAMED[family][2] if family in NAMED else None)
    chat = make_chat()
    reader = ResponseReader(chat.tokenizer, Markup(BLOCKS, ANSWER_TAGS))
    reference = ReferenceEngine(model, chat, reader, max_new_tokens=tokens, sizes=BatchSizes.same(batch_size))
    return Lab(loaded, reference, make_editor(loaded), pacing)


def short_lab(family: str, **options: Any) -> Lab:
    """A lab for short responses: their chunks wait for each other after four tokens."""
    return make_lab(family, pacing=SHORT, **options)


def trials(lab: Lab, count: int) -> list[TrialParams]:
    """Random trials over the components that the model has."""
    components = {target.component for target in lab.loaded.targets}
    found = [make_params(seed) for seed in range(count)]
    return [
        dataclasses.replace(params, kernels={name: kernel for name, kernel in params.kernels.items() if name in components})
        for params in found
    ]


def last_layer() -> TrialParams:
    """An edit of the last of three layers alone."""
    kernels = {name: Kernel(1.0, 2.0, 1.0, 0.5) for name in ("attn.o_proj", "mlp.down_proj")}
    return TrialParams("per layer", 1.0, kernels)


def whole(engine: TrialEngine | ReferenceEngine) -> Observed:
    """The first-token log-probabilities, and whole responses."""
    responses = engine.respond(HARMFUL)
    assert responses is not None
    return engine.first_logprobs(HARMLESS), [response.text for response in responses]


def assert_same(found: Observed, expected: Observed) -> None:
    """KL is within 1e-5, and responses are equal."""
    assert kl_divergence(expected[0], found[0]).max() < 1e-5
    assert (expected[0] - found[0]).abs().max() < 1e-3
    assert found[1] == expected[1]


def markers_of(texts: Sequence[str], share: float = 0.5) -> list[str]:
    """Markers that occur in about this share of the texts, cut from the middles of texts."""
    normal = [normalize(text) for text in texts]
    chosen = normal[: max(1, round(share * len(normal)))]
    return [text[len(text) // 3 : len(text) // 3 + 3].strip() or text[:2] for text in chosen if text]


def with_batch_size(reference: ReferenceEngine, batch_size: int) -> ReferenceEngine:
    """The same reference with another batch size."""
    return ReferenceEngine(
        reference.model,
        reference.chat,
        reference.reader,
        max_new_tokens=reference.max_new_tokens,
        sizes=BatchSizes.same(batch_size),
    )


def limited(model: PreTrainedModel, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a pass of more than `rows` rows, after the first token, run out of memory; the rows of all such passes."""
    sizes: list[int] = []
    forward = type(model).forward

    def out_of_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        n, tokens = kwargs["input_ids"].shape
        if tokens == 1:
            sizes.append(n)
            if n > rows:
                raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", out_of_memory)
    return sizes


def make_setup(lab: Lab) -> EngineSetup:
    """The setup of an engine in this lab."""
    return EngineSetup(lab.reference, lab.loaded.layers, lab.editor.hooks, None, HARMFUL, HARMLESS, (1, 2), pacing=lab.pacing)


def trusted(lab: Lab, warnings: list[str], **switches: bool) -> TrialEngine | ReferenceEngine:
    """The engine that passes the self-check."""

    def edit() -> None:
        lab.editor.apply(last_layer())
        assert lab.editor.hooks.first_layer == 2

    efficiency = EfficiencySettings(**switches)  # type: ignore[arg-type]
    return trusted_engine(make_setup(lab), efficiency, edit, lab.editor.clear, warnings.append)
