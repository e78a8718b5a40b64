"""Explain the report's terms in one plain sentence each: as hints on headings, and as a list at the page's foot for phones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What a kernel's coeff says of an edit: as the end of a sentence, and as short as an axis needs it.

    `directed`: the edit removes directions, so that it matters from which layer they are.
    """

    sentence: str
    short: str
    directed: bool = True


_ABLATION = Reading(
    "says how much of the direction it loses: 0 is none and 1 all of it, and more goes beyond",
    "1 removes all of the direction",
)
# By edit mode, where the coeff isn't the share of the direction that is removed.
_READINGS = {
    "key-conditional": Reading(
        "says how many times what it writes along the direction is taken off, of inputs like those of harmful prompts alone",
        "times what inputs of harmful prompts write along the direction is taken off",
    ),
    "least-squares": Reading(
        "says how many times the change that weighs its inputs of harmful prompts against others is made",
        "times what inputs of harmful prompts write along the direction is taken off, as far as others allow it",
    ),
    "arbitrary-rank": Reading(
        "scales the change that was found for it: 0 is none and 1 the whole change",
        "1 is the whole change that was found",
        directed=False,
    ),
}

WORDS = {
    "refusals": "Harmful prompts whose response contains a refusal marker, such as “I can't help with that”.",
    "unanswered": "Harmful prompts that got no real answer: a refusal, or a broken or off-topic response.",
    "broken": "Responses that the base model finds too unlikely, too repetitive or cut off.",
    "off-topic": "Responses that fit other prompts about as well as their own.",
    "KL": (
        "Kullback-Leibler divergence: how far the edited model's probabilities of the next token are from the base model's, in "
        "nats (units of the natural logarithm); 0 means no change, and less is better."
    ),
    "front": "The trials that no other trial beats in all objectives at once (the Pareto front).",
    "knee": "The trial of the front that is farthest below the straight line between the front's two ends.",
    "hypervolume": "One number for a whole front: the area or volume of results that it beats, as a share; more is better.",
    "stopped": "A trial that was ended early (pruned), because it can't reach the front; its counts are lower bounds.",
    "certified": "Certain rather than estimated: a certified stop ends a trial only when it can't reach the front any more.",
    "direction": "The unit vector that is removed; a number says from which layer it was taken.",
    "scope": "Whether all layers lose one common direction (global) or each layer its own (per layer).",
    "coeff λ": (
        "How strongly a matrix is edited: 0 leaves it as it is, and where the edit is plain ablation, 1 removes the direction "
        "wholly."
    ),
    "kernel": "How the coeff depends on the layer: it is largest at one layer and falls to an edge on both sides.",
    "β": "The weight that refinement gives to harmless answers staying as they are.",
    "cosine": "How alike two directions are: 1 is the same, 0 at right angles, and −1 opposite.",
    "probe": "The share of prompts that a linear classifier tells apart as harmful or harmless; 0.5 is guessing.",
    "silhouette": "How clearly two groups of points are apart, from −1 to 1; 0 is not at all.",
    "held out": "Prompts that neither the directions nor the search have seen.",
    "perplexity": "How surprised a model is by a text, per token; 1 is not at all.",
}

# Headings of tables and names of figures, and the word that explains each.
_HEADINGS = {
    **dict.fromkeys(("KL mean", "KL median", "KL max"), "KL"),
    **dict.fromkeys(("λ", "λ, least", "λ, mean", "λ, largest"), "coeff λ"),
    **dict.fromkeys(("cosine to its start", "cosine to its start, mean"), "cosine"),
    **dict.fromkeys(("cos(harmful, harmless)", "cos(harmful, d)", "cos(harmless, d)"), "cosine"),
    "on the front": "front",
    "state": "stopped",
    "refined by gradient": "β",
}


def reading(mode: str) -> Reading:
    """What coeffs say of edits of this mode; that of ablation if the mode is unknown."""
    return _READINGS.get(mode, _ABLATION)


def used_in(text: str) -> dict[str, str]:
    """The words that occur in a text, by their first part and in any case, with their explanations."""
    found = text.lower()
    return {word: said for word, said in WORDS.items() if word.split()[0].lower() in found}


def explanation(heading: str) -> str:
    """The sentence that explains a heading; empty where the heading needs none."""
    return WORDS.get(_HEADINGS.get(heading, heading), "")
