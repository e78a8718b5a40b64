"""The base model's log-probabilities in few bytes: the same KL as from all of them, and its bounds."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.errors import TrialError
from abliterate.evaluation.base import Observation
from abliterate.evaluation.kl import CHUNK, KL, REST, LikelyTokens, kl_divergence

VOCABULARY = 3000


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
    elif shape == "flat":
        noise *= 0
    return noise


SHAPES = ("peaked", "steep", "two", "wide", "huge", "flat", "plain")


@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 999),
    size=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 5.0, 20.0]),
    suppressed=st.sampled_from([0, 1, 40]),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_dense_kl(shape: str, seed: int, size: float, suppressed: int) -> None:
    raw = logits(shape, seed)
    change = (size * torch.randn(raw.shape, generator=generator(seed + 2))).clamp(-25, 25)  # log ratios spread over 50
    edited = raw + change
    hidden = torch.randperm(VOCABULARY, generator=generator(seed + 3))[:suppressed]
    raw[:, hidden] = edited[:, hidden] = -torch.inf
    base, edited = logprobs(raw), logprobs(edited)
    kept = LikelyTokens.of(base)
    expected = dense(base, edited)
    if kept is None:
        assert shape in ("flat", "plain", "wide")
        return
    assert kept.nbytes < base.nbytes
    assert float(kept.rest.max()) <= REST
    found = kept.kl(edited)
    assert (found >= 0).all()
    # Log-probabilities of −1e4 are rounded to 1e-3 in float32, in the dense form too.
    tolerance = 1e-5 if shape != "huge" else max(1e-5, 1e-6 * float(expected.max()))
    assert float((found - expected.clamp_min(0)).abs().max()) <= tolerance
    assert float((found - kl_divergence(base, edited)).abs().max()) <= 1e-5


def test_the_bucket_is_a_lower_bound_within_what_is_promised() -> None:
    """The worst case: the edit moves all of the rare tokens' mass to one of them."""
    raw = logits("steep", 0)
    base = logprobs(raw)
    kept = LikelyTokens.of(base)
    assert kept is not None
    rare = raw[0].argsort(descending=True)[kept.counts[0] :]
    edited = raw[:1].clone()
    edited[0, rare[0]] += 25
    edited[0, rare[1:]] -= 25
    one = LikelyTokens.of(base[:1])
    assert one is not None
    missing = float(dense(base[:1], logprobs(edited)) - one.kl(logprobs(edited)))
    assert 1e-8 < missing <= REST * 50


@pytest.mark.parametrize("size", [1e-4, 1.0, 20.0])
def test_has_the_bits_of_the_dense_kl_where_nothing_is_left_out(size: float) -> None:
    base = torch.full((3, 200), -torch.inf)
    base[:, :20] = torch.randn(3, 20, generator=generator(0))  # 20 tokens are all there is
    edited = base + size * torch.randn(base.shape, generator=generator(1))
    kept = LikelyTokens.of(logprobs(base))
    assert kept is not None
    assert kept.counts == (20, 20, 20)
    assert torch.equal(kept.kl(logprobs(edited)), kl_divergence(logprobs(base), logprobs(edited)))


def test_equal_distributions_have_no_divergence() -> None:
    base = logprobs(logits("steep", 3))
    kept = LikelyTokens.of(base)
    assert kept is not None
    assert float(kept.kl(base).max()) < 1e-13


def test_a_peaked_distribution_takes_a_twentieth() -> None:
    base = logprobs(logits("peaked", 0, 50_000) * 2)
    kept = LikelyTokens.of(base)
    assert kept is not None
    assert kept.nbytes < 0.05 * base.nbytes
    assert kept.logprobs.untyped_storage().nbytes() == kept.logprobs.nbytes, "a view keeps more alive"
    assert kept.tokens.dtype == torch.int32


def test_a_flat_distribution_stays_as_it_is() -> None:
    base = logprobs(logits("flat", 0))
    assert LikelyTokens.of(base) is None
    scorer = KL()
    scorer.setup(Observation((), base))
    assert scorer._base is base


def test_rows_are_told_apart_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.cat([logits(shape, seed) for seed, shape in enumerate(("peaked", "steep", "two", "steep"))])
    base, edited = logprobs(raw), logprobs(raw + torch.randn(raw.shape, generator=generator(9)))
    kept = LikelyTokens.of(base)
    assert kept is not None
    assert len(set(kept.counts)) > 3
    together = kept.kl(edited)
    torch.testing.assert_close(together, dense(base, edited), rtol=0, atol=1e-6)
    for rows in (1, 3, 5):
        monkeypatch.setattr("abliterate.evaluation.kl.CHUNK", rows * VOCABULARY)
        assert torch.equal(kept.kl(edited), together)
    assert CHUNK >= VOCABULARY


def test_edits_that_take_everything_from_the_likely_tokens() -> None:
    """Q is then nearly 1, and 1 − Σ q would have no correct digit in the opposite case."""
    raw = logits("peaked", 1)
    edited = raw.clone()
    edited[:, 7] -= 80
    base = logprobs(raw)
    kept = LikelyTokens.of(base)
    assert kept is not None
    torch.testing.assert_close(kept.kl(logprobs(edited)), dense(base, logprobs(edited)), rtol=1e-6, atol=1e-5)
    back = logprobs(raw).clone()
    back[:, :7] -= 90  # below what float32 can represent as a probability
    back[:, 8:] -= 90
    assert torch.isfinite(kept.kl(back)).all()
    torch.testing.assert_close(kept.kl(back), dense(base, back), rtol=1e-6, atol=1e-5)


def test_a_token_that_the_edit_forbids_is_a_failed_trial_however_rare() -> None:
    base = logprobs(logits("peaked", 2))
    scorer = KL()
    scorer.setup(Observation((), base))
    assert isinstance(scorer._base, LikelyTokens)
    for token in (7, int(base[0].argmin())):
        edited = base.clone()
        edited[0, token] = -torch.inf
        with pytest.raises(TrialError, match="not finite"):
            scorer.score(Observation((), edited))


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
