"""The base model's log-probabilities in few bytes: the same KL as from all of them, and its bounds."""

from __future__ import annotations

import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.errors import TrialError
from abliterate.scorers.base import Observation
from abliterate.scorers.kl import (
    CHUNK,
    KL,
    RATIO,
    REST,
    WITHIN,
    LikelyTokens,
    RoundedLogprobs,
    kl_divergence,
    small_forms,
    smallest_form,
    with_float64,
)

VOCABULARY = 3000
Form = LikelyTokens | RoundedLogprobs


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logprobs(logits: Tensor) -> Tensor:
    """As the engine gives them."""
    return logits.float().log_softmax(-1)


def dense(base: Tensor, edited: Tensor) -> Tensor:
    """KL in float64 throughout, of float32 log-probabilities."""
    p, q = base.double(), edited.double()
    return torch.where(base == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


def logits(shape: str, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    """Two rows (2, vocabulary) of one kind of distribution."""
    noise = torch.randn(2, vocabulary, generator=generator(seed))
    if shape == "peaked":
        noise[:, 7] += 30
    elif shape == "steep":  # probabilities fall evenly over 80 nats
        noise -= torch.linspace(0, 80, vocabulary)[torch.randperm(vocabulary, generator=generator(seed + 1))]
    elif shape == "two":
        noise[:, :2] += 40
    elif shape == "wide":
        noise *= 6
    elif shape == "huge":
        noise *= 1e4
    elif shape == "tailed":  # 20 likely tokens above 2e-4 of noise
        noise *= 2
        noise[:, :20] = 22 - 0.5 * torch.arange(20)
    elif shape == "flat":
        noise *= 0
    return noise


SHAPES = ("peaked", "steep", "two", "wide", "huge", "flat", "plain")


def likely_of(base: Tensor) -> LikelyTokens:
    """The first form."""
    form = small_forms(base)[0]
    assert isinstance(form, LikelyTokens)
    return form


def rounded_of(base: Tensor) -> RoundedLogprobs:
    """The second form."""
    form = small_forms(base)[1]
    assert isinstance(form, RoundedLogprobs)
    return form


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 999),
    size=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 5.0, 20.0]),
    suppressed=st.sampled_from([0, 1, 40]),
)
@settings(max_examples=150, deadline=None)
def test_every_form_equals_the_dense_kl(shape: str, seed: int, size: float, suppressed: int) -> None:
    raw = logits(shape, seed)
    change = (size * torch.randn(raw.shape, generator=generator(seed + 2))).clamp(-25, 25)  # log ratios within 50
    edited = raw + change
    hidden = torch.randperm(VOCABULARY, generator=generator(seed + 3))[:suppressed]
    raw[:, hidden] = edited[:, hidden] = -torch.inf
    base, edited = logprobs(raw), logprobs(edited)
    expected = dense(base, edited).clamp_min(0)
    best = smallest_form(base)
    assert best.nbytes <= base.nbytes
    for form in small_forms(base):
        assert best.nbytes <= form.nbytes
        found = form.kl(edited)
        assert found.dtype == torch.float64
        assert (found >= 0).all()
        # Where log-probabilities are −1e4, float32 rounds the terms of the dense form too.
        tolerance = WITHIN if shape != "huge" else max(WITHIN, 1e-6 * float(expected.max()))
        assert float((found - expected).abs().max()) <= tolerance
        assert float((found - kl_divergence(base, edited)).abs().max()) <= tolerance


def test_the_bucket_is_a_lower_bound_within_what_is_promised() -> None:
    """The worst case: the edit moves all of the rare tokens' mass to one of them."""
    raw = logits("steep", 0)
    base = logprobs(raw)
    kept = likely_of(base)
    rare = raw[0].argsort(descending=True)[kept.likely.counts[0] :]
    edited = raw[:1].clone()
    edited[0, rare[0]] += 25
    edited[0, rare[1:]] -= 25
    missing = float(dense(base[:1], logprobs(edited)) - likely_of(base[:1]).kl(logprobs(edited)))
    assert 1e-8 < missing <= REST * RATIO


@pytest.mark.parametrize("shape", ["wide", "tailed"])
def test_rounding_stays_within_what_is_promised(shape: str) -> None:
    """The worst case: the edit follows the rounding of each token, as far as is allowed."""
    base = logprobs(logits(shape, 0, 20_000))
    form = rounded_of(base)
    back = form.low + (form.codes.float() + 32767) * form.step
    assert 0 < float((back - base).abs().max()) <= 0.51 * float(form.step.max())
    follows = (RATIO - 1) * (back - base).sign()
    at = 0
    for row, count in enumerate(form.exact.counts):
        assert count > 0
        follows[row, form.exact.tokens[at : at + count].long()] = 0
        at += count
    for sign in (-1, 1):
        edited = base + sign * follows - 1  # no distribution: the bound holds term by term, and the sum stays above 0
        error = float((form.kl(edited) - dense(base, edited)).abs().max())
        assert 1e-7 < error <= WITHIN


@pytest.mark.parametrize("size", [1e-4, 1.0, 20.0])
def test_has_the_bits_of_the_dense_kl_where_nothing_is_left_out(size: float) -> None:
    base = torch.full((3, 200), -torch.inf)
    base[:, :20] = torch.randn(3, 20, generator=generator(0))  # 20 tokens are all there is
    edited = base + size * torch.randn(base.shape, generator=generator(1))
    kept = likely_of(logprobs(base))
    assert kept.likely.counts == (20, 20, 20)
    assert torch.equal(kept.kl(logprobs(edited)), kl_divergence(logprobs(base), logprobs(edited)))


def test_equal_distributions_have_no_divergence() -> None:
    base = logprobs(logits("steep", 3))
    kept = likely_of(base)
    assert float(kept.kl(base).max()) < 1e-13
    assert float(rounded_of(base).kl(base).max()) < 1e-6


def test_a_peaked_distribution_takes_a_twentieth() -> None:
    base = logprobs(logits("peaked", 0, 50_000) * 2)
    kept = likely_of(base)
    assert kept.nbytes < 0.05 * base.nbytes
    some = kept.likely
    assert some.logprobs.untyped_storage().nbytes() == some.logprobs.nbytes, "a view keeps more alive"
    assert some.tokens.dtype == torch.int32
    assert isinstance(smallest_form(base), LikelyTokens)


def test_a_long_tail_takes_half() -> None:
    """As large vocabularies have it: too much mass in too many tokens to leave out, too little for 16 bits to matter."""
    base = logprobs(logits("tailed", 0, 50_000))
    form = smallest_form(base)
    assert isinstance(form, RoundedLogprobs)
    assert form.nbytes < 0.52 * base.nbytes
    assert likely_of(base).nbytes > base.nbytes


def test_a_flat_distribution_stays_as_it_is() -> None:
    base = logprobs(logits("plain", 0))
    assert small_forms(base) == ()
    scorer = KL()
    scorer.setup(Observation((), base))
    assert scorer._base is base


def test_rows_are_told_apart_in_every_chunk() -> None:
    raw = torch.cat([logits(shape, seed) for seed, shape in enumerate(("peaked", "steep", "two", "steep"))])
    base, edited = logprobs(raw), logprobs(raw + torch.randn(raw.shape, generator=generator(9)))
    kept = likely_of(base)
    assert len(set(kept.likely.counts)) > 3
    together = kept.kl(edited)
    torch.testing.assert_close(together, dense(base, edited), rtol=0, atol=1e-6)
    torch.testing.assert_close(rounded_of(base).kl(edited), together, rtol=0, atol=WITHIN)
    for rows in (1, 3, 5):
        assert torch.equal(kept.kl(edited, rows * VOCABULARY), together)
        torch.testing.assert_close(rounded_of(base).kl(edited, rows * VOCABULARY), together, rtol=0, atol=WITHIN)
    assert CHUNK >= 4 * VOCABULARY


def test_edits_that_take_everything_from_the_likely_tokens() -> None:
    """Q is then nearly 1, and 1 − Σ q would have no correct digit in the opposite case."""
    raw = logits("peaked", 1)
    edited = raw.clone()
    edited[:, 7] -= 80
    base = logprobs(raw)
    kept = likely_of(base)
    torch.testing.assert_close(kept.kl(logprobs(edited)), dense(base, logprobs(edited)), rtol=1e-6, atol=1e-5)
    back = logprobs(raw).clone()
    back[:, :7] -= 90  # below what float32 can represent as a probability
    back[:, 8:] -= 90
    assert torch.isfinite(kept.kl(back)).all()
    torch.testing.assert_close(kept.kl(back), dense(base, back), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("shape", "form"), [("peaked", LikelyTokens), ("tailed", RoundedLogprobs)])
def test_a_token_that_the_edit_forbids_is_a_failed_trial_however_rare(shape: str, form: type[Form]) -> None:
    base = logprobs(logits(shape, 2))
    scorer = KL()
    scorer.setup(Observation((), base))
    assert isinstance(scorer._base, form)
    for token in (7, int(base[0].argmin())):
        edited = base.clone()
        edited[0, token] = -torch.inf
        with pytest.raises(TrialError, match="not finite"):
            scorer.score(Observation((), edited))


def test_an_impossible_token_is_seen_where_another_one_becomes_possible() -> None:
    """As many impossible tokens as before, but others."""
    raw = logits("peaked", 1)
    raw[:, 100] = -torch.inf
    base, edited = logprobs(raw), logprobs(logits("peaked", 1))
    edited[:, 200] = -torch.inf
    for form in (likely_of(base), rounded_of(base)):
        assert torch.isinf(form.kl(edited)).all()
        assert torch.isfinite(form.kl(base)).all()


def test_numbers_that_are_none_are_a_failed_trial() -> None:
    base = logprobs(logits("peaked", 2))
    scorer = KL()
    scorer.setup(Observation((), base))
    with pytest.raises(TrialError, match="not numbers"):
        scorer.score(Observation((), torch.full_like(base, math.nan)))
    scorer.setup(Observation((), torch.full_like(base, math.nan)))  # the baseline's own score then says it
    with pytest.raises(TrialError, match="not numbers"):
        scorer.score(Observation((), torch.full_like(base, math.nan)))


def test_the_scorer_lets_go_of_all_log_probabilities() -> None:
    base = logprobs(logits("peaked", 4))
    edited = logprobs(logits("peaked", 5))
    expected = dense(base, edited)
    scorer = KL()
    scorer.setup(Observation((), base))
    ref = weakref.ref(base)
    del base
    gc.collect()
    assert ref() is None
    score = scorer.score(Observation((), edited))
    assert score.value == pytest.approx(float(expected.mean()), abs=1e-5)


def test_a_device_without_float64_is_left() -> None:
    elsewhere, here = SimpleNamespace(device=torch.device("mps"), cpu=lambda: "a copy"), torch.zeros(2)
    assert with_float64(elsewhere) == "a copy"  # type: ignore[arg-type]
    assert with_float64(here) is here
