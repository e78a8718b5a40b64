"""The model card: plainly what was done to which model, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abliterate import __version__

_CARD = """\
---
base_model: {base}
tags:
- abliterated
- abliterate
---

# {base}, with refusal ablated

This is {base}{revision} after directional ablation: the direction along which the model separates prompts it refuses
from prompts it answers was removed from matrices that write to the residual stream. No training took place.

**Its safety behaviour was altered on purpose.** It refuses less than the base model, also where the base model was
right to refuse. Whoever runs or passes on this model answers for what it is used for.

| | base | this model |
|---|---|---|
| refusals ({n_harmful} harmful prompts, marker count) | {before} | {after} |
| KL(base‖this), first token, {n_harmless} harmless prompts | 0 | mean {mean:.4f}, median {median:.4f}, max {max:.4f} |

The scores are those of the prompts that the search optimized over, so they are optimistic; a marker count is not a
judgement of the answers' quality or safety.

Edit `{mode}` ({representation}{approximation}), direction method `{method}`; trial {number} of a search with seed {seed}, made
with abliterate {version}. Parameters:

```json
{params}
```
"""


def model_card(facts: Mapping[str, Any]) -> str:
    """The card's text; `facts` has the names in the template, `params` and `kl` as JSON-able values.

    `approximation` {"mean", "max"}: what a low-rank representation loses of each matrix's change; empty for exact ones.
    """
    revision = f" (revision {facts['revision']})" if facts["revision"] else ""
    params = json.dumps(facts["params"], indent=1)
    lost = facts["approximation"]
    approximation = (
        f", which misses {lost['mean']:.1%} of a matrix's change on average, {lost['max']:.1%} at most" if lost else ""
    )
    texts = {"revision": revision, "params": params, "approximation": approximation, "version": __version__}
    return _CARD.format(**{**facts, **facts["kl"], **texts})
