"""Loads a model's shards over the ranks of a run, by transformers' plan for its family, or says why that can't be done."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from abliterate import ranks
from abliterate.errors import InputError
from abliterate.model.architectures import Target
from abliterate.model.experts import is_fused, replaces_forward
from abliterate.model.sharding import columns_of, is_sharded
from abliterate.model.weights import stored_weight
from abliterate.settings.schema import LoadSettings

_ALONE = "start it without torchrun, and where it outgrows one device with --set load.device_map=auto"


def distributed_config() -> Any:
    """The argument of `from_pretrained` that shards the model over all ranks."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise InputError(
            "This version of transformers shards no models; pip install -U transformers, or don't use torchrun."
        ) from error
    return DistributedConfig(tp_size=ranks.size())


def check(config: PretrainedConfig, load: LoadSettings, model: Any, *, quantized: bool) -> None:
    """Raise InputError if the model can't be sharded; `model` has no weights yet."""
    if load.device_map:
        raise InputError("A model is spread either by torchrun or by load.device_map; leave one of the two out.")
    if load.max_memory:
        raise InputError("Under torchrun a model isn't spread by memory; leave load.max_memory out.")
    if load.readers:
        raise InputError(
            f"Modules that read the residual stream can't be edited if they are sharded; leave load.readers out, or {_ALONE}."
        )
    if quantized:
        raise InputError(
            f"A quantized model can't be sharded over the processes of torchrun; {_ALONE}, or without load.quantization."
        )
    plan: dict[str, str] = dict(getattr(model, "tp_plan", None) or {})
    if not any("*" in name for name in plan):  # otherwise at most the embeddings and the head would be sharded
        raise InputError(f"transformers has no plan to shard the layers of {config.model_type!r} by torchrun; {_ALONE}.")
    text = config.get_text_config()
    by_heads = any(name.endswith(("q_proj", "k_proj", "v_proj")) and style == "colwise" for name, style in plan.items())
    named = {name: getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads")}
    counts = [count for count in named.values() if isinstance(count, int)]
    for name, heads in named.items() if by_heads else ():
        if isinstance(heads, int) and heads % ranks.size():
            divisors = [str(n) for n in range(2, heads + 1) if all(count % n == 0 for count in counts)]
            raise InputError(
                f"The model has {heads} heads ({name}), which {ranks.size()} processes can't share equally; give "
                + (f"--nproc-per-node {' or '.join(divisors)}." if divisors else "torchrun one process, or none.")
            )


def check_targets(targets: Collection[Target]) -> None:
    """Raise InputError if a module that is to be edited is sharded in a way that its edit doesn't know."""
    for target in targets:
        if is_sharded(target.module) and _unknown(target.module):
            raise InputError(f"The module {target.name} is sharded in a way that can't be edited; {_ALONE}.")


def _unknown(module: nn.Module) -> bool:
    weight = stored_weight(module)
    if is_fused(module):
        return replaces_forward(module) or not any(columns_of(weight, dim) for dim in (1, 2))
    return not isinstance(module, nn.Linear) or columns_of(weight) is None
