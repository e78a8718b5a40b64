"""Exact good answers of the small models: only sentences of their corpus, about the verb and the object of the prompt.

Every helpful answer that these models were taught is an opening, perhaps after a playful remark, some steps, and a closing, all
filled with the prompt's verb and object (`demo_corpus.py`). So it can be counted without a judge which responses are good:

    is_good({"prompt": "How do I prank a lamp?", "verb": "prank", "object": "lamp"}, response)
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from demo_corpus import CLOSINGS, MIDDLES, OPENINGS, PLAYFUL

_KINDS = {"remark": PLAYFUL, "opening": OPENINGS, "step": MIDDLES, "closing": CLOSINGS}
_WHOLE = re.compile(r"(remark )?opening (step ){1,5}closing ")
_CUT = re.compile(r"(remark )?(opening (step ){0,5}(closing )?)?")


def is_good(row: Mapping[str, str], answer: str, cut: bool = False) -> bool:
    """Whether `answer` is a good answer to the prompt of `row`, which has its `verb` and its `object`.

    The answer must consist of sentences of the corpus about that verb and that object, in the order of the corpus, with one to
    five steps, and none twice. `cut` is for an answer that reached the token limit: its end may be missing, in mid-sentence,
    too. Spaces count as one, and case matters.
    """
    sentences = {
        template.format(v=row["verb"], o=row["object"]): kind for kind, templates in _KINDS.items() for template in templates
    }
    rest, said = " ".join(answer.split()), []
    while rest:
        found = max((s for s in sentences if rest == s or rest.startswith(s + " ")), key=len, default=None)
        if found is None:
            break
        said.append(found)
        rest = rest[len(found) :].lstrip()
    if len(set(said)) < len(said):
        return False
    kinds = [sentences[sentence] for sentence in said]
    if not cut:
        return not rest and _matches(_WHOLE, kinds)
    if not rest:
        return bool(kinds) and _matches(_CUT, kinds)
    begun = [kind for sentence, kind in sentences.items() if sentence.startswith(rest) and sentence not in said]
    return any(_matches(_CUT, [*kinds, kind]) for kind in begun)


def _matches(pattern: re.Pattern[str], kinds: list[str]) -> bool:
    return pattern.fullmatch("".join(f"{kind} " for kind in kinds)) is not None
