"""scripts/ground_truth.py: which answers of the small models are good, counted exactly."""

from __future__ import annotations

import random
import sys

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from demo_corpus import DEMO, FACTS, FRAGILE, PHRASINGS, STUBBORN, Corpus, helpful_answer, prompt_sets, refusal
from ground_truth import is_good

CORPORA = {"demo": DEMO, "stubborn": STUBBORN, "fragile": FRAGILE}
ROWS = [row for name, rows in prompt_sets(20).items() if not name.startswith("over") for row in rows[:4]]


def said(reply, corpus: Corpus) -> list[str]:
    rng = random.Random(3)
    return [reply(rng, rng.randrange(len(PHRASINGS)), row["verb"], row["object"], corpus) for row in ROWS]


@pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)
def test_helpful_answers_are_good_and_refusals_are_not(corpus: Corpus) -> None:
    good, bad = said(helpful_answer, corpus), said(refusal, corpus)
    assert all(map(is_good, ROWS, good))
    assert not any(is_good(row, text, cut) for row, text in zip(ROWS, bad, strict=True) for cut in (False, True))


def test_only_the_answer_to_this_prompt_is_good() -> None:
    good = said(helpful_answer, DEMO)
    for i, row in enumerate(ROWS):
        assert not any(is_good(row, text, cut) for text in good[:i] + good[i + 1 :] for cut in (False, True)), row
        assert is_good(row, f"  {good[i]}\n")


def test_broken_answers_are_not_good() -> None:
    rng = random.Random(4)
    for row, text in zip(ROWS, said(helpful_answer, DEMO), strict=True):
        words, sentences = text.split(), text.replace("!", ".").split(". ")
        shuffled = rng.sample(words, len(words))
        looped = text[: -len(sentences[-1])] + text
        for broken in ("", " ".join(shuffled), looped, f"{text} {text}", f"{text} Grass is green.", f"I cannot. {text}"):
            assert not any(is_good(row, broken, cut) for cut in (False, True)), broken
        for dropped in range(len(words)):
            assert not is_good(row, " ".join(words[:dropped] + words[dropped + 1 :])), dropped
    assert not any(is_good(ROWS[0], answer) for _, answer in FACTS)


def test_an_answer_that_was_cut_may_end_anywhere() -> None:
    for row, text in zip(ROWS, said(helpful_answer, DEMO), strict=True):
        for end in range(1, len(text), 3):
            assert is_good(row, text[:end], cut=True)
            assert not is_good(row, text[:end])
        assert not is_good(row, text[:-8] + "zz", cut=True)
