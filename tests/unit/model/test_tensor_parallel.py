"""What can't be sharded is refused by one sentence, before weights are loaded."""

from __future__ import annotations

import pytest
from transformers import PretrainedConfig

from abliterate import ranks
from abliterate.errors import InputError
from abliterate.model import tensor_parallel
from abliterate.model.checkpoint import empty_model
from abliterate.settings.schema import LoadSettings
from support.models import make_model


def refuse(monkeypatch: pytest.MonkeyPatch, family: str, count: int, *, quantized: bool = False, **load: object) -> str:
    monkeypatch.setattr(ranks, "_size", count)
    settings = LoadSettings(**load)  # type: ignore[arg-type]
    config: PretrainedConfig = make_model(family).config
    with pytest.raises(InputError) as error:
        tensor_parallel.check(config, settings, empty_model(config, settings), quantized=quantized)
    return str(error.value)


def test_refusals_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "has no plan to shard the layers of 'gpt_oss'" in refuse(monkeypatch, "gpt_oss", 2)
    assert "4 heads (num_attention_heads), which 3 processes can't share equally" in refuse(monkeypatch, "llama", 3)
    assert "2 heads (num_key_value_heads)" in refuse(monkeypatch, "llama", 4)
    assert "without torchrun" in refuse(monkeypatch, "llama", 2, quantized=True)
    assert "leave load.readers out" in refuse(monkeypatch, "llama", 2, readers=True)
    assert "load.device_map" in refuse(monkeypatch, "llama", 2, device_map="auto")


def test_a_process_of_its_own_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.size() == 1
    assert ranks.is_first()
    assert ranks.agree(lambda: 3) == 3
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with ranks.joined():
        assert ranks.size() == 1
    assert not ranks.is_silent()


@pytest.mark.parametrize(("local", "speaks"), [("0", True), ("1", False)])
def test_too_few_gpus_are_said_by_the_first_process_of_a_machine(
    local: str, speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_speaks", False)
    for name, value in {"WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    ranks._check_gpus(4)
    with pytest.raises(InputError, match=r"has 2 GPUs, and torchrun started 4 processes on it"):
        ranks._check_gpus(2)
    assert ranks.is_silent() != speaks
