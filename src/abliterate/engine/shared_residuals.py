"""Feed the beginning that all prompts share once for their residuals, instead of once per prompt.

Chat templates begin every prompt with the same system prompt and markup: 14 of 35 tokens of `scripts/real_model.py`'s prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate import ranks
from abliterate.engine.forward import Passes
from abliterate.engine.kv_cache import is_supported, sharing_of
from abliterate.engine.layout import shared_prefix
from abliterate.engine.prefill import NoEdit, Prefill
from abliterate.engine.self_check import FAULTS, spread
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.memory import clear_device_cache
from abliterate.model.residuals import Feed, capture_batch
from abliterate.types import Prompt

# The least relative difference that counts, hundreds of times that of the demo (3e-7) in float32. A mistake gives 0.1 and more.
FLOOR = 1e-4
# The multiple of the dtype's precision that rounding explains: 3 % in bfloat16, where the demo's difference is 0.7 %.
PRECISIONS = 4


def shared_feed(
    model: PreTrainedModel, layers: nn.ModuleList, chat: PromptEncoder, prompts: Sequence[Prompt], *, amp: bool = False
) -> Feed | None:
    """A `Feed` for batches of `prompts` that continues from their common beginning; the model must carry no edit.

    It is None where nothing would be saved, where the model's cache can't be shared by prompts of unequal length, and where
    the residuals of a few prompts differ from those of plain passes by more than rounding.
    """
    tokens = {prompt: chat.token_ids(prompt) for prompt in prompts}
    rows = list(tokens.values())
    prefix = shared_prefix(rows)
    checked = [prompts[row] for row in spread([len(tokens[prompt]) for prompt in prompts])]
    # The check feeds its prompts twice.
    if len(prefix) * (len(rows) - 1) <= 2 * sum(len(tokens[prompt]) for prompt in checked):
        return None
    passes = Passes(model, layers)
    if not passes.takes_positions:
        return None
    first = torch.tensor([prefix[:1]], device=chat.device)
    try:
        with torch.no_grad():
            _, cache = passes(first, torch.ones_like(first), None)
        shares = is_supported(cache) and sharing_of(cache, model.config.get_text_config()) == "between"
    except FAULTS:
        shares = False
    if not shares:
        return None
    prefill = Prefill(passes, NoEdit(), "between")

    def feed(batch: Sequence[Prompt]) -> None:
        group = prefill.group(range(len(batch)), [tokens[prompt] for prompt in batch], prefix, chat.device)
        prefill(group, torch.arange(len(batch), device=chat.device), keep_cache=False)

    agrees = _agrees(model, layers, chat, checked, feed, amp=amp)
    return feed if ranks.agree(lambda: agrees) else None


def _agrees(
    model: PreTrainedModel, layers: nn.ModuleList, chat: PromptEncoder, prompts: Sequence[Prompt], feed: Feed, *, amp: bool
) -> bool:
    """Whether the prompts' residuals by `feed` are those of plain passes, within rounding."""
    home = chat.device
    try:
        plain, shared = (capture_batch(model, layers, chat, prompts, amp=amp, home=home, feed=way) for way in (None, feed))
    except FAULTS:
        clear_device_cache(home)
        return False
    rounding = torch.finfo(torch.bfloat16 if amp else model.dtype).eps
    return difference(plain, shared) <= max(FLOOR, PRECISIONS * rounding)


def difference(expected: Tensor, actual: Tensor) -> float:
    """The largest ‖actual − expected‖ ÷ ‖expected‖ over prompts and layers of residuals (n, n_layers+1, d_model)."""
    errors = (actual - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(torch.finfo(expected.dtype).tiny)
    return float(errors.max()) if torch.isfinite(errors).all() else float("inf")
