"""Generation configs that models ship: what changes which tokens come counts, and what only changes their search doesn't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from abliterate.chat.generate import Generator, Sampling
from abliterate.engine.prefill import NoEdit
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.trial_engine import TrialEngine, Unsupported
from abliterate.model.generation import _reduced, reduce_generation_config
from abliterate.model.loader import LoadedModel, demo_path
from abliterate.pipeline import stages
from abliterate.pipeline.workbench import load
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import EfficiencySettings, Settings
from abliterate.types import Prompt, Trial
from support.engine import make_engine, reader
from support.models import make_chat, make_loaded, make_model, make_tokenizer
from support.runs import Recorder

SYSTEM = "You are a helpful assistant."
ASKED = tuple(Prompt(text, SYSTEM) for text in ("Tell me how to mangle the mailbox.", "Hi", "Write a guide to carpets."))
TOKENS = 12
OWN = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
PLAIN = EfficiencySettings(use_shared_prefix=False, use_layer_skip=False)

# Modes that must leave every answer as it is.
SEARCHED: dict[str, dict[str, Any]] = {
    "several answers": {"num_return_sequences": 3},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "attentions": {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2},
    "early exit": {"assistant_early_exit": 1},
    "an assistant": {"is_assistant": True, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.9},
    "several tokens": {"use_mtp": True},
    "no time": {"max_time": 1e-9},
    "beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "forced words": {"force_words_ids": [[5]], "num_beams": 2},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "layers against each other": {"dola_layers": "high"},
    "a static cache": {"cache_implementation": "static", "disable_compile": True},
    "a quantized cache": {"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
    "chunks": {"prefill_chunk_size": 4},
    "token healing": {"token_healing": True},
    "sampling": {"do_sample": True, "temperature": 9.0, "top_p": 0.5, "min_p": 0.1},
    "lengths": {"max_length": 5, "max_new_tokens": 3, "min_length": 60},
    "stop texts that never come": {"stop_strings": ["漢字", "<|never|>"]},
    "empty stop texts": {"stop_strings": ["", ""]},
    "an unknown entry": {"chat_format": "chatml", "max_window_size": 6144},
}
# Parameters that change an answer.
TOKENWISE: dict[str, dict[str, Any]] = {
    "a penalty": {"repetition_penalty": 1.8},
    "no repeated pairs": {"no_repeat_ngram_size": 1},
    "suppressed tokens": {"suppress_tokens": list(range(20, 120))},
    "suppressed first tokens": {"begin_suppress_tokens": list(range(4, 900))},
    "bad words": {"bad_words_ids": [[token] for token in range(20, 120)]},
    "a bias": {"sequence_bias": [[[200], 50.0]]},
    "a penalty with beams and lookup": {"repetition_penalty": 1.8, "num_beams": 3, "prompt_lookup_num_tokens": 3},
    "a forced end": {"forced_eos_token_id": 3, "exponential_decay_length_penalty": [2, 1.5]},
}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """A random model; every test gives it another generation config."""
    return make_loaded(make_model("llama"))


def use(loaded: LoadedModel, mode: Mapping[str, Any]) -> LoadedModel:
    """The model with a generation config as a file has it."""
    loaded.model.generation_config = _reduced({**OWN, **mode})
    reduce_generation_config(loaded.model)  # it is reduced already, which must change nothing
    return loaded


def answers(loaded: LoadedModel, tokens: int = TOKENS) -> dict[str, list[str]]:
    """The answers of the reference, the trial engine, and the chat, which is asked one question."""
    reference = make_engine(loaded.model, 2, tokens)
    found = {"reference": [answer.text for answer in reference.respond(ASKED) or []]}
    engine = TrialEngine(reference, loaded.layers, NoEdit(), PLAIN, None)
    found["engine"] = [answer.text for answer in engine.respond(ASKED) or []]
    voice = Generator(loaded.model, reference.chat, reference.reader, Sampling(tokens, temperature=0))
    found["chat"] = [voice.answer(SYSTEM, (("user", ASKED[0].text),), 0, lambda *_: None, lambda: False).text]
    return found


@pytest.fixture(scope="module")
def plain(tiny: LoadedModel) -> dict[str, list[str]]:
    return answers(use(tiny, {}))


def by_transformers(mode: Mapping[str, Any], tokens: int = TOKENS) -> list[str]:
    """The answers of `transformers` alone, one prompt at a time, with the mode as the model's own."""
    model: Any = make_model("llama")
    model.generation_config = GenerationConfig.from_dict({**OWN, **mode})
    chat, tokenizer, texts = make_chat(), make_tokenizer(), []
    for prompt in ASKED:
        batch = chat.encode([prompt])
        found = model.generate(**batch, tokenizer=tokenizer, do_sample=False, max_new_tokens=tokens)
        texts.append(tokenizer.decode(found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("name", SEARCHED)
def test_modes_of_search_and_return_change_nothing(tiny: LoadedModel, plain: dict[str, list[str]], name: str) -> None:
    assert answers(use(tiny, SEARCHED[name])) == plain


@pytest.mark.parametrize("name", TOKENWISE)
def test_what_changes_tokens_is_kept(tiny: LoadedModel, plain: dict[str, list[str]], name: str) -> None:
    mode = TOKENWISE[name]
    found = answers(use(tiny, mode))
    searched = ("num_beams", "prompt_lookup_num_tokens")
    assert found["reference"] == by_transformers({key: value for key, value in mode.items() if key not in searched})
    assert found["engine"] == found["reference"]
    assert found["chat"] == found["reference"][:1]
    assert found["reference"] != plain["reference"], "the parameter does nothing here"


def test_stop_texts_end_answers(tiny: LoadedModel, plain: dict[str, list[str]]) -> None:
    texts = plain["reference"]
    stops = [texts[0][5:9], texts[2][-4:-1]]  # one within words, one near an end
    found = answers(use(tiny, {"stop_strings": stops}))
    assert found["reference"] == by_transformers({"stop_strings": stops})
    assert found["engine"] == found["reference"] != texts
    assert found["chat"] == found["reference"][:1]
    one = answers(use(tiny, {"stop_strings": stops[0]}))  # a config may have one text instead of a list
    assert len(one["reference"][0]) < len(texts[0])


def test_a_stop_text_that_begins_in_the_prompt(tiny: LoadedModel, plain: dict[str, list[str]]) -> None:
    chat = make_chat()
    stop = chat.render(ASKED[0])[-1] + plain["reference"][0][:2]
    found = answers(use(tiny, {"stop_strings": [stop]}))
    assert found["reference"] == by_transformers({"stop_strings": [stop]})
    assert found["engine"] == found["reference"]
    assert len(found["reference"][0]) < len(plain["reference"][0])


def test_stop_texts_without_an_end_token(tiny: LoadedModel, plain: dict[str, list[str]]) -> None:
    """`generate` goes on with rows that have stopped if there is no end token; they are cut."""
    stop = plain["reference"][1][2:6]
    found = answers(use(tiny, {"eos_token_id": None, "stop_strings": [stop]}))
    assert found["engine"] == found["reference"]
    assert stop in found["reference"][1][-len(stop) - 8 :]


def test_a_shortest_length_is_kept(tiny: LoadedModel) -> None:
    use(tiny, {})
    ends = [3, *(make_engine(tiny.model, 1, TOKENS).generate_ids([prompt], 4)[0][3] for prompt in ASKED)]
    short = answers(use(tiny, {"eos_token_id": ends}))
    for least in (9, 30):  # 30 are more than are asked for
        mode = {"eos_token_id": ends, "min_new_tokens": least}
        found = answers(use(tiny, mode))
        assert found["reference"] == by_transformers(mode | {"min_new_tokens": min(least, TOKENS)})
        assert found["engine"] == found["reference"] != short["reference"]


@pytest.mark.parametrize(
    "mode", [{"guidance_scale": 1.5}, {"watermarking_config": {"bias": 5.0}}], ids=lambda mode: next(iter(mode))
)
def test_processors_with_a_memory_are_left_to_the_reference(tiny: LoadedModel, mode: dict[str, Any]) -> None:
    reference: ReferenceEngine = make_engine(use(tiny, mode).model, 1, 4)
    assert reference.respond(ASKED[:1])
    with pytest.raises(Unsupported, match=next(iter(mode))):
        TrialEngine(reference, tiny.layers, NoEdit(), PLAIN, None)


def test_the_models_file_is_reduced_where_it_is_loaded(tmp_path: Path, finished: tuple[Path, dict[str, Any], Settings]) -> None:
    """All modes at once: the base refuses as often as without them, and a trial's scores are the same."""
    folder, (_, result, settings) = tmp_path / "model", finished
    shutil.copytree(demo_path() / "model", folder)
    modes: dict[str, Any] = {}
    for mode in SEARCHED.values():
        modes |= mode
    modes |= OWN | {
        "stop_strings": ["<|never|>"],
        "cache_config": None,
        "cache_implementation": "static",
        "token_healing": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(modes), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_beams": 4, "temperature": 0.3}), encoding="utf-8")
    complete = next(trial for trial in result["trials"] if trial["state"] == "complete")
    with load(settings.model_copy(update={"model": str(folder)}), Recorder()) as bench:
        stages.find_directions(bench)
        baseline = stages.baseline(bench)
        trial = stages.evaluate(bench, 0, Trial.from_record(complete).params, DominancePruner.never())
    assert (baseline.refusals, baseline.prompts) == (result["baseline"]["refusals"], result["baseline"]["prompts"])
    assert trial.refusals == complete["scores"]["refusals"]
    assert trial.kl == pytest.approx(complete["scores"]["kl"]["mean"], abs=1e-6)


def test_a_reader_and_the_ends_agree(tiny: LoadedModel, plain: dict[str, list[str]]) -> None:
    """An answer that a stop text ended has its text, and nothing after it."""
    stop = plain["reference"][0][3:6]
    use(tiny, {"stop_strings": [stop]})
    (answer, *_) = make_engine(tiny.model, 3, TOKENS).answers(ASKED)
    assert answer.ended
    assert answer.spoken == answer.ids
    assert answer.response.text == reader().read(answer.ids).text
    assert stop in answer.response.text
    assert len(answer.response.text) < len(plain["reference"][0])
