"""Prompts longer than the model reads: an error before weights are read, or a warning where positions are computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from abliterate.errors import InputError
from abliterate.model.loader import demo_path
from abliterate.pipeline.lengths import _response_tokens, check_lengths, has_table, named_sets, positions_of
from abliterate.pipeline.workbench import load
from abliterate.prompts.sets import HeldoutSets, PromptSets
from abliterate.settings.schema import Settings
from abliterate.types import Prompt
from support.cli import Invoke, Outcome, assert_sentence, prompt_options
from support.models import make_chat, make_model, make_tokenizer
from support.runs import Recorder, quick_settings

LIMIT = 64
SHORT, LONG = Prompt("Hi", ""), Prompt("How do I squash a very old hat at home? " * 8, "")


# A search whose training prompts have no responses: no yardstick, and no refinement.
UNANSWERED_TRAINING: dict[str, Any] = {"search": {"objectives": ("refusals", "kl")}, "refine": {"enabled": False}}


def check(
    family: str,
    sets: Mapping[str, Sequence[Prompt]],
    response: int = 4,
    options: Mapping[str, Any] = UNANSWERED_TRAINING,
    **sizes: Any,
) -> list[str]:
    """The warnings on these sets for a tiny model of a family."""
    warnings: list[str] = []
    model = make_model(family, **sizes)
    settings = Settings(response={"max_new_tokens": response}, **options)  # type: ignore[arg-type]
    check_lengths(settings, model.config, make_chat(), sets, warnings.append)
    return warnings


def tokens_of(prompt: Prompt) -> int:
    return len(make_chat().token_ids(prompt))


def test_learned_positions_are_an_error_that_names_the_prompt() -> None:
    with pytest.raises(InputError) as caught:
        check("gpt2", {"harmful": [SHORT], "harmless_eval": [SHORT, SHORT, LONG]}, n_positions=LIMIT)
    text = str(caught.value)
    assert f"Prompt 3 of the set harmless_eval has {tokens_of(LONG)} tokens and its response up to 4" in text
    assert f"can read {LIMIT} tokens" in text
    assert "response.max_new_tokens" in text
    assert text.endswith(".")


@pytest.mark.parametrize("name", ["harmful_eval", "harmless_eval", "harmful_heldout", "harmless_heldout", "over_refusal"])
def test_the_response_counts_where_there_is_one(name: str) -> None:
    """The last token of a response is not read, so exactly as many positions as tokens but one are enough."""
    limit = tokens_of(SHORT) + 9
    assert check("gpt2", {name: [SHORT]}, 10, n_positions=limit) == []
    with pytest.raises(InputError, match=f"Prompt 1 of the set {name}"):
        check("gpt2", {name: [SHORT]}, 11, n_positions=limit)


@pytest.mark.parametrize("name", ["harmful", "harmless"])
def test_directions_read_prompts_alone(name: str) -> None:
    assert check("gpt2", {name: [SHORT]}, 500, n_positions=tokens_of(SHORT)) == []
    with pytest.raises(InputError) as caught:
        check("gpt2", {name: [SHORT]}, 500, n_positions=tokens_of(SHORT) - 1)
    assert "max_new_tokens" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "read"),
    [
        ("harmful", {"search": UNANSWERED_TRAINING["search"], "refine": {"enabled": True, "tokens": 4}}, 48),
        ("harmful", {"search": UNANSWERED_TRAINING["search"], "refine": {"enabled": True, "tokens": 30}}, 60),
        ("harmless", {"search": UNANSWERED_TRAINING["search"], "refine": {"enabled": True}}, 100),
        ("harmless", {"search": {"objectives": ("unanswered", "kl")}, "refine": {"enabled": False}}, 100),
    ],
)
def test_refinement_and_the_yardstick_answer_training_prompts(name: str, options: dict[str, Any], read: int) -> None:
    limit = tokens_of(SHORT) + read - 1
    assert check("gpt2", {name: [SHORT]}, 100, options, n_positions=limit) == []
    with pytest.raises(InputError, match=f"Prompt 1 of the set {name}.* up to {read}"):
        check("gpt2", {name: [SHORT]}, 100, options, n_positions=limit - 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])
def test_rotary_positions_are_a_warning(family: str) -> None:
    (warning,) = check(family, {"harmful_eval": [SHORT, LONG, LONG]}, max_position_embeddings=LIMIT)
    assert f"Prompt 2 of the set harmful_eval has {tokens_of(LONG)} tokens" in warning
    assert "(1 more is too long)" in warning
    assert f"trained on {LIMIT}" in warning
    assert check(family, {"harmful_eval": [SHORT]}, max_position_embeddings=LIMIT) == []


@pytest.mark.parametrize(
    ("config", "options"), [("OPTConfig", {"max_position_embeddings": LIMIT}), ("GPTJConfig", {"n_positions": LIMIT})]
)
def test_other_tables_of_positions(config: str, options: dict[str, Any]) -> None:
    """OPT's table has two rows more than positions; GPT-J's is fixed, not learned, and ends all the same."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    sizes |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4} if config == "GPTJConfig" else {"ffn_dim": 16}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes, **options))
    assert positions_of(model.config) == LIMIT
    assert has_table(model, LIMIT)


def test_models_without_a_limit_read_everything() -> None:
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2)  # distances instead of positions
    assert positions_of(config) == 0
    check_lengths(Settings(), config, make_chat(), {"harmful": [LONG]}, pytest.fail)


def test_all_sets_have_their_names() -> None:
    sets = named_sets(PromptSets((SHORT,), (SHORT,), (LONG,), (SHORT,)), HeldoutSets((SHORT,), (LONG,)))
    assert list(sets)[:4] == ["harmful", "harmless", "harmful_eval", "harmless_eval"]
    assert sets["harmless_heldout"] == (LONG,)
    assert named_sets(None) == {}


def gpt2_folder(folder: Path, limit: int) -> Path:
    """A tiny model with learned positions and the demo's tokenizer."""
    make_model("gpt2", n_positions=limit).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_ends_before_calibration(invoke: Invoke, prompt_files: dict[str, str], tmp_path: Path) -> None:
    model = gpt2_folder(tmp_path / "gpt2", 96)
    long = tmp_path / "long.jsonl"
    lines = Path(prompt_files["harmful_eval"]).read_text(encoding="utf-8").splitlines()
    long.write_text("\n".join([*lines[:2], json.dumps({"prompt": LONG.text}), *lines[2:]]) + "\n", encoding="utf-8")
    options = prompt_options(prompt_files | {"harmful_eval": str(long)})
    outcome = invoke("run", str(model), *options, "-o", "run", "--set", "evaluation.heldout=false")
    said, _, error = outcome.err.rpartition("error: ")
    assert_sentence(Outcome(outcome.code, outcome.out, f"error: {error}"), 2, "Prompt 3 of the set harmful_eval")
    assert "calibrate" not in said + outcome.out
    assert not (tmp_path / "run").exists()


def test_a_long_system_prompt_is_named_before_weights_are_read(
    prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's own test generation would fail on it."""
    model = gpt2_folder(tmp_path / "gpt2", 48)
    settings = quick_settings(prompt_files, tmp_path / "cache", model=str(model), prompts={"system": LONG.text})
    with pytest.raises(InputError, match="can read 48 tokens"):
        load(settings, Recorder())


def test_a_run_beyond_the_trained_range_warns_once(prompt_files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (demo_path() / "model").iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}), encoding="utf-8")
    recorder = Recorder()
    with load(quick_settings(prompt_files, tmp_path / "cache", model=str(folder)), recorder):
        pass
    assert len([text for text in recorder.warnings if "trained on 40" in text]) == 1


def test_answers_along_which_inputs_are_captured_count() -> None:
    over = {"search": {"objectives": ("refusals", "kl")}, "refine": {"enabled": False}}
    plain = Settings.model_validate(over)
    assert "harmless" not in _response_tokens(plain)
    captured = Settings.model_validate(over | {"edit": {"mode": "least-squares", "capture_tokens": 7}})
    assert _response_tokens(captured) == _response_tokens(plain) | {"harmless": 7}
