"""Configs that don't validate: the sentence names the field, what stands there, and what is wrong with it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import InputError
from abliterate.model import loader, model_config
from abliterate.settings.schema import LoadSettings
from support.models import CPU, make_model
from support.zoo import make_specimen

LAYERS = ["full_attention"] * 3


def wrong(folder: Path, family: str = "qwen2", **fields: Any) -> str:
    """The error of a model whose config has these fields; a dictionary changes an object's fields."""
    config = (make_model(family) if family in ("qwen2", "llama", "gpt2") else make_specimen(family)).config
    config.save_pretrained(folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for name, value in fields.items():
        raw[name] = {**raw[name], **value} if isinstance(value, dict) and isinstance(raw.get(name), dict) else value
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        loader.skeleton(str(folder), LoadSettings(), CPU)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


FIELDS: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"num_hidden_layers": 5}, "num_hidden_layers", "5|layer_types"),
    ({"layer_types": LAYERS[:2]}, "layer_types", "3"),
    ({"layer_types": ["full_attention", "x", "full_attention"]}, "layer_types", "must be in"),
    ({"layer_types": "full_attention"}, "layer_types", "list"),
    ({"hidden_size": "32"}, "hidden_size", "expected int, got str"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers", "expected int, got str"),
    ({"num_attention_heads": 4.5}, "num_attention_heads", "expected int, got float"),
    ({"num_attention_heads": None}, "num_attention_heads", "NoneType"),
    ({"hidden_size": None}, "hidden_size", "NoneType"),
    ({"vocab_size": None}, "vocab_size", "NoneType"),
    ({"intermediate_size": -8}, "intermediate_size", "negative"),
    ({"num_attention_heads": 0}, "num_attention_heads", "zero"),
    ({"num_key_value_heads": 0}, "num_key_value_heads", "zero"),
    ({"hidden_act": "no_such_activation"}, "hidden_act", "no_such_activation"),
    ({"hidden_act": 3}, "hidden_act", "expected str"),
    ({"rope_parameters": {"rope_type": "no_such_rope"}}, "rope_parameters.rope_type", "no_such_rope"),
    ({"rope_parameters": "default"}, "rope_parameters", "default"),
    ({"dtype": "bf16"}, "dtype", "bf16"),
    ({"dtype": "float17"}, "dtype", "float17"),
    ({"pad_token_id": 99999}, "pad_token_id", "99999|embedding"),
    ({"quantization_config": "4bit"}, "quantization_config", "4bit"),
    ({"quantization_config": [4]}, "quantization_config", "[4]"),
    ({"text_config": {"hidden_size": 32}}, "text_config", "no such part"),
    ({"model_type": ["qwen2"]}, "model_type", "a name is expected"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "expected bool"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "at least 1"),
    ({"num_hidden_layers": 10**8, "layer_types": None}, "num_hidden_layers", "no model has more than 2000"),
    ({"num_hidden_layers": 10**18}, "num_hidden_layers", "no model has more"),
    ({"hidden_size": 10**9}, "hidden_size", "no model has more"),
    ({"vocab_size": 1e300}, "vocab_size", "no model has more"),
    ({"vocab_size": -1}, "vocab_size", "at least 1"),
    ({"num_labels": 10**12}, "num_labels", "no model has more"),
    ({"num_attention_heads": 10**9}, "num_attention_heads", "no model has more"),
)


@pytest.mark.parametrize(("fields", "name", "said"), FIELDS, ids=[json.dumps(fields)[:50] for fields, *_ in FIELDS])
def test_the_field_is_named(fields: dict[str, Any], name: str, said: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    text = wrong(tmp_path, **fields)
    assert name in text
    assert re.search(said, text.partition(name)[2]), text
    assert "unexpected" not in text
    assert time.monotonic() - begin < 10


def test_a_field_inside_of_an_object_is_named(tmp_path: Path) -> None:
    assert 'text_config.hidden_activation ("nothing") is wrong' in wrong(
        tmp_path / "a", "gemma3_vl", text_config={"hidden_activation": "nothing"}
    )
    assert "text_config.hidden_size (1000000000) is wrong" in wrong(
        tmp_path / "b", "gemma3_vl", text_config={"hidden_size": 10**9}
    )
    tower = {"num_hidden_layers": 0}  # is no reason to refuse a model
    assert "hidden_act" in wrong(tmp_path / "d", "gemma3_vl", vision_config=tower, text_config={"hidden_activation": "nothing"})
    assert "vision_config" in wrong(tmp_path / "c", "gemma3_vl", vision_config={"num_attention_heads": "4"})


def test_other_families(tmp_path: Path) -> None:
    assert "activation_function" in wrong(tmp_path / "a", "gpt2", activation_function="nothing")
    assert "n_embd" in wrong(tmp_path / "b", "gpt2", n_embd=None)
    assert "mlp_bias" in wrong(tmp_path / "c", "llama", mlp_bias="no")


def test_too_many_parameters_in_all(tmp_path: Path) -> None:
    text = wrong(
        tmp_path, hidden_size=10**6, intermediate_size=10**7, vocab_size=10**7, num_hidden_layers=100, layer_types=None
    )
    assert "parameters, more than any model has" in text


def test_a_kind_of_model_that_is_unknown(tmp_path: Path) -> None:
    assert "no_such_model" in wrong(tmp_path, model_type="no_such_model")


def test_a_field_is_not_searched_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_config, "_SECONDS", 0.0)
    assert "config.json: " in wrong(tmp_path, hidden_act="nothing")
