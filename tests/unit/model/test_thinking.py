"""Thinking models: what is part of a response, and what becomes of a thinking block that a template or a model opens."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.generate import _Reading
from abliterate.engine.ends import Ends
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader, VisibleText
from abliterate.engine.self_check import EngineSetup
from abliterate.engine.stopping import StopWhenDiverged
from abliterate.engine.trial_engine import TrialEngine
from abliterate.errors import AbliterateError, InputError
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, demo_path
from abliterate.model.thinking import Markup
from abliterate.pipeline.calibrate import detect_prefix, prefix_responses
from abliterate.pipeline.from_settings import markup_of
from abliterate.pipeline.run import run
from abliterate.pipeline.workbench import load
from abliterate.scorers.base import Response
from abliterate.scorers.refusals import Refusals
from abliterate.settings.schema import EfficiencySettings, ResponseSettings
from abliterate.settings.sources import load_settings
from abliterate.types import BatchSizes, Prompt
from support.models import CPU, make_chat, make_editor, make_loaded, make_model, make_params, make_tokenizer
from support.runs import Recorder, quick_settings, run_in

DEFAULT = ResponseSettings()
MARKUP = Markup(DEFAULT.thinking_blocks, DEFAULT.answer_tags)
ANALYSIS, COMMENTARY = "<|channel|>analysis<|message|>", "<|channel|>commentary<|message|>"
FINAL, TURN, SAID = "<|channel|>final<|message|>", "<|start|>assistant", "<|end|>"
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>")


def with_special(*tokens: str) -> PreTrainedTokenizerBase:
    """The demo's tokenizer with more special tokens: of the vocabulary, without a role as GPT-OSS has them."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


GPT_OSS = with_special(*HARMONY)
# (name, what was generated, what is the response, whether it is still thinking)
GENERATED = [
    ("analysis", f"{ANALYSIS}I cannot{SAID}{TURN}{FINAL}Sure.<|return|>", "Sure.", False),
    ("straight to final", f"{FINAL}Sure.<|return|>", "Sure.", False),
    ("nothing in final", f"{FINAL}<|return|>", "", False),
    ("preamble", f"{COMMENTARY}I cannot{SAID}{TURN}{FINAL}Sure.<|return|>", "Sure.", False),
    (
        "analysis, preamble",
        f"{ANALYSIS}No{SAID}{TURN}{COMMENTARY}I cannot{SAID}{TURN}{FINAL}Sure.<|return|>",
        "Sure.",
        False,
    ),
    ("twice", f"{ANALYSIS}No{SAID}{TURN}{ANALYSIS}I cannot{SAID}{TURN}{FINAL}Sure.", "Sure.", False),
    ("a tool", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>", "", True),
    ("cut in analysis", f"{ANALYSIS}I cannot", "", True),
    ("cut after analysis", f"{ANALYSIS}I cannot{SAID}", "", True),
    ("cut in a header", f"{ANALYSIS}I cannot{SAID}{TURN}{FINAL[:-11]}", "", True),
    ("gemma 4", "<|channel>thought\nI cannot<channel|>Sure.", "Sure.", False),
    ("gemma 4, empty", "<|channel>thought\n<channel|>Sure.", "Sure.", False),
    ("cohere", "<|START_THINKING|>I cannot<|END_THINKING|>\n<|START_RESPONSE|>Sure.<|END_RESPONSE|>", "\nSure.", False),
    ("hunyuan", "<think>\nI cannot\n</think>\n<answer>\nSure.\n</answer>", "\n\nSure.\n", False),
    ("an empty answer", "<think></think><answer></answer>", "", False),
    ("ernie", "<think>\nI cannot\n</think>\n\n<response>\nSure.\n</response>", "\n\n\nSure.\n", False),
    ("seed", "<seed:think>I cannot</seed:think>Sure.", "Sure.", False),
    ("magistral", "[THINK]I cannot[/THINK]Sure.", "Sure.", False),
    ("kimi", "◁think▷I cannot◁/think▷Sure.", "Sure.", False),
    ("apertus", "<|inner_prefix|>I cannot<|inner_suffix|>Sure.", "Sure.", False),
    ("openthinker", "<|begin_of_thought|>I cannot<|end_of_thought|><|begin_of_solution|>Sure.", "Sure.", False),
    ("reasoning", "<reasoning>I cannot</reasoning>Sure.", "Sure.", False),
    ("exaone deep", "<thought>I cannot</thought>Sure.", "Sure.", False),
    ("other special tokens", "Sure.<|constrain|><|return|>", "Sure.", False),
]


@pytest.mark.parametrize(("text", "expected", "is_open"), [row[1:] for row in GENERATED], ids=[row[0] for row in GENERATED])
def test_a_response_is_the_answer_alone(text: str, expected: str, is_open: bool) -> None:
    """Read as a whole and as it grows: what is thought, and the markup, is no part of it, so no marker there counts."""
    ids = GPT_OSS(text, add_special_tokens=False)["input_ids"]
    reader = ResponseReader(GPT_OSS, MARKUP)
    assert reader.read(ids) == Response(expected, thinking_open=is_open)
    for markers, found in ((["i cannot", "assistant", "final", "analysis", "answer"], False), (["sure."], "Sure" in expected)):
        growing = reader.watch(Refusals(markers).stream())
        assert max(growing.feed([token]) for token in ids) == found


class Listener:
    """A stream that keeps what it is fed."""

    def __init__(self) -> None:
        self.text = ""

    def feed(self, text: str) -> bool:
        """Never settled."""
        self.text += text
        return False


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.sampled_from([ANALYSIS, COMMENTARY, FINAL, TURN, SAID, "<think>", "</think>", "No", " ", "<answer>"])),
    is_open=st.booleans(),
)
def test_what_a_growing_response_shows_stays(parts: list[str], is_open: bool) -> None:
    """Of the response as it is then, and of the whole: that is what lets it end at its first marker."""
    ids = GPT_OSS("".join(parts), add_special_tokens=False)["input_ids"]
    reader, listener = ResponseReader(GPT_OSS, MARKUP), Listener()
    growing = reader.watch(listener, starts_open=is_open)
    whole = reader.read(ids, starts_open=is_open).text
    for end, token in enumerate(ids, start=1):
        growing.feed([token])
        assert reader.read(ids[:end], starts_open=is_open).text.startswith(listener.text)
        assert whole.startswith(listener.text)


class Model:
    """Answers a prompt after a prefix as the dictionary says, and remembers what it was asked."""

    def __init__(self, answers: dict[str, Sequence[str]]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, prefix: str) -> Sequence[str]:
        self.asked.append(prefix)
        return self.answers[prefix]


@pytest.mark.parametrize(
    ("tail", "closing"),
    [
        ("<|im_end|>\n<|im_start|>assistant\n<think>\n", "\n</think>"),
        ("<｜Assistant｜><think>", "</think>"),
        ("[|assistant|]<thought>\n", "\n</thought>"),
        ("[/INST][THINK]", "[/THINK]"),
        ("<|turn>model\n<|channel>thought\n", "\n<channel|>"),
        (f"{TURN}{ANALYSIS}", f"{SAID}{TURN}{FINAL}"),
    ],
)
def test_a_block_that_the_template_opens_is_closed(tail: str, closing: str) -> None:
    model = Model({closing: ["\n\nSure", "\n\nNo"]})
    prefix, notes = detect_prefix(model, MARKUP, [tail, tail])
    assert prefix == closing + "\n\n"
    assert model.asked == [closing]
    assert len(notes) == 1
    assert "template opens" in notes[0]
    assert "skipped" in notes[0]


@pytest.mark.parametrize("tail", ["<think>\n\n</think>\n\n", "<｜Assistant｜></think>", "<|channel>thought\n<channel|>", TURN])
def test_a_block_that_the_template_closes_is_left(tail: str) -> None:
    model = Model({"": ["Sure", "No"]})
    assert detect_prefix(model, MARKUP, [tail, tail]) == ("", [])


def test_blocks_open_for_some_prompts_are_only_said() -> None:
    prefix, notes = detect_prefix(Model({"": ["Hm</think>Sure", "No"]}), MARKUP, ["<think>\n", "\n"])
    assert prefix == ""
    assert "for some prompts" in notes[0]


def test_harmony_that_thinks_first() -> None:
    closed = f"{ANALYSIS}{SAID}{TURN}{FINAL}"
    model = Model({"": [f"{ANALYSIS}The user", f"{ANALYSIS}We must"], closed: ["Sure", "I cannot"]})
    assert detect_prefix(model, MARKUP, [TURN, TURN])[0] == closed


def test_harmony_that_goes_straight_to_the_answer() -> None:
    model = Model({"": [f"{FINAL}Sure", f"{FINAL}I cannot"]})
    assert detect_prefix(model, MARKUP, [TURN, TURN]) == (FINAL, [])


def test_harmony_that_does_both() -> None:
    """What is shared is no whole tag: cut there, the rest of the header would be read as an answer."""
    closed = f"{ANALYSIS}{SAID}{TURN}{FINAL}"
    both = [f"{ANALYSIS}The user", f"{FINAL}I cannot", f"{ANALYSIS}We must"]
    model = Model({"": both, closed: ["Sure", "I cannot", "Well"]})
    prefix, notes = detect_prefix(model, MARKUP, [TURN] * 3)
    assert prefix == closed
    assert "2 of 3 responses open a thinking block" in notes[0]
    assert detect_prefix(Model({"": both}), MARKUP, [TURN] * 3, skip=False)[0] == ""


@pytest.mark.parametrize("lead", ["", "\n", "Answer:\n"])
def test_a_block_that_some_responses_open_is_closed_for_all(lead: str) -> None:
    texts = [f"{lead}<think>\nHm", f"{lead}Sure", f"{lead}I cannot"]
    closed = f"{lead}<think></think>"
    prefix, notes = detect_prefix(Model({"": texts, closed: ["\nSure", "\nNo", "\nWell"]}), MARKUP)
    assert prefix == closed + "\n"
    assert "1 of 3 responses" in notes[0]


def test_a_block_after_a_shared_start_is_closed_there() -> None:
    closed = "Well. <think></think>"
    model = Model({"": ["Well. <think>a", "Well. <think>b"], closed: ["Sure", "No"]})
    prefix, notes = detect_prefix(model, MARKUP)
    assert prefix == closed
    assert "all responses" in notes[0]


def test_a_block_that_the_model_closes_itself_is_left_as_it_is() -> None:
    """R1 and its like answer some prompts after an empty block of their own."""
    own = "<think>\n\n</think>\n\n"
    assert detect_prefix(Model({"": [own + "Sure", own + "No"]}), MARKUP) == (own, [])


def test_a_model_that_begins_to_think_again() -> None:
    closed = "<think></think>"
    model = Model({"": ["<think>a", "<think>b"], closed: ["\n<think>Hm, a", "\n<think>Hm, b"]})
    prefix, notes = detect_prefix(model, MARKUP)
    assert prefix == closed + "\n"
    assert "again" in notes[1]


@pytest.mark.parametrize(
    ("texts", "tails", "prefix"),
    [
        (["<think>\nHm, a", "<think>\nHm, b"], ["\n", "\n"], "<think>\nHm,"),
        (["Hm, a", "Hm, b"], ["<think>\n", "<think>\n"], "Hm,"),
        (["<think>\nHm", "No"], ["\n", "\n"], ""),
    ],
)
def test_kept_thinking_is_not_closed(texts: list[str], tails: list[str], prefix: str) -> None:
    """The first response token is then the first one that tells, within the block."""
    found, notes = detect_prefix(Model({"": texts}), MARKUP, tails, skip=False)
    assert found == prefix
    assert "kept: the response follows it, within response.max_new_tokens" in notes[0]


def test_second_look_finds_an_answer_tag() -> None:
    closed = "<|START_THINKING|><|END_THINKING|>"
    after = [f"<|START_RESPONSE|>{text}<|END_RESPONSE|>" for text in ("Sure", "No")]
    model = Model({"": ["<|START_THINKING|>a", "<|START_THINKING|>b"], closed: after})
    assert detect_prefix(model, MARKUP)[0] == closed + "<|START_RESPONSE|>"
    cut = Model({"": ["<answer>Sure", "<article>No"]})
    assert detect_prefix(cut, MARKUP)[0] == ""  # not `<a`, which would hide the tag


def test_tags_of_settings_are_checked() -> None:
    for value in (["<think>", "</think>"], ["", "</think>"], ["<think>", "<think>"]):
        with pytest.raises(InputError, match="thinking_blocks"):
            load_settings("", {"response": {"thinking_blocks": [value]}})
    with pytest.raises(InputError, match="answer_tags"):
        load_settings("", {"response": {"answer_tags": [""]}})


# Markup of letters, which a random model writes all the time.
LETTERS = Markup([("e", "ea"), ("i", "io")], ["t", "n"])
QUESTIONS = tuple(map(Prompt, ("Hi", "Mangle the mailbox", "Now", "How do I squash a very old hat?", "What?", "Ha")))


@pytest.fixture(scope="module")
def lab() -> tuple[LoadedModel, Editor]:
    """A random model and an editor."""
    loaded = make_loaded(make_model("llama"))
    return loaded, make_editor(loaded)


def reference_of(loaded: LoadedModel, markup: Markup, prefix: str = "", tokens: int = 24) -> ReferenceEngine:
    """The reference on the random model."""
    chat = PromptEncoder(make_chat().tokenizer, CPU, prefix)
    reader = ResponseReader(chat.tokenizer, markup)
    return ReferenceEngine(loaded.model, chat, reader, max_new_tokens=tokens, sizes=BatchSizes.same(3))


@pytest.mark.parametrize("prefix", ["", "e", "ea"])
def test_engine_reads_what_the_reference_reads(lab: tuple[LoadedModel, Editor], prefix: str) -> None:
    """Streamed and in one piece, drafted and not, over several trials: the same blocks, and the same markers outside them."""
    loaded, editor = lab
    editor.clear()
    reference = reference_of(loaded, LETTERS, prefix)
    scorer = Refusals(["ra", "ve", "us"])
    setup = EngineSetup(reference, loaded.layers, editor.hooks, scorer, QUESTIONS, QUESTIONS, range(3))
    engine = setup.engine(EfficiencySettings())
    assert isinstance(engine, TrialEngine)
    opened, flags, hidden = set(), set(), 0
    for seed in range(5):
        editor.apply(make_params(seed))
        expected, found = reference.respond(QUESTIONS), engine.respond(QUESTIONS)
        assert expected is not None
        assert found is not None
        assert [scorer.is_refusal(one) for one in found] == [scorer.is_refusal(one) for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert other.text.startswith(one.text)
            # A response that ends early is one that counts already.
            assert one == other or scorer.is_refusal(one)
        opened |= {one.thinking_open for one in expected}
        flags |= {scorer.is_refusal(one) for one in expected if not one.thinking_open and one.text}
        raw = [Response(text) for text in reference.raw_responses(QUESTIONS)]
        hidden += sum(
            scorer.is_refusal(one) and not scorer.is_refusal(dataclasses.replace(other, thinking_open=False))
            for one, other in zip(raw, expected, strict=True)
            if other.text
        )
    assert opened == {True, False}
    assert hidden > 0, "markers within blocks"
    assert flags == {True, False}


def test_early_detection_sees_the_blocks_that_whole_responses_show(lab: tuple[LoadedModel, Editor]) -> None:
    """One response begins with a block whose tag is several tokens long: looking on until that is certain."""
    loaded, editor = lab
    editor.clear()
    plain = reference_of(loaded, Markup([]))
    texts = plain.raw_responses(QUESTIONS)
    for row in range(len(QUESTIONS)):
        opening = texts[row][:18]
        assert len(plain.chat.tokenizer(opening)["input_ids"]) > 3
        reference = reference_of(loaded, Markup([(opening, opening + "</t>")]))
        early, whole = (found_by(reference, loaded, EfficiencySettings(use_trial_engine=on)) for on in (True, False))
        assert early == whole
        assert "1 of 6 responses open" in early[1][0]


class Letters:
    """A chat whose tokens are characters."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Their text."""
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("texts", "enough"),
    [
        (("Sure", "No"), True),
        (("<th", "No"), False),  # may be a block or a heading
        (("<the", "No"), True),
        (("<thi", "<thx"), False),  # what they share is the beginning of a tag
        (("<think>", "<thx"), True),
        (("\n\n", "\nNo"), False),
        (("\n<think>", "\nNo"), True),
        (("<|channel|>an", "<|channel|>fin"), False),
        ((ANALYSIS, "<|channel|>fin"), True),  # an answer's tag is never shared in part
    ],
)
def test_a_look_is_long_enough_to_see_who_thinks(texts: tuple[str, ...], enough: bool) -> None:
    watch = StopWhenDiverged(Letters(), Ends({0}), MARKUP)  # type: ignore[arg-type]
    watch.begin(range(len(texts)))
    for row, text in enumerate(texts):
        watch.look(row, [ord(character) for character in text])
    assert watch.satisfied == enough
    watch.look(0, [0])  # an ended response won't change any more
    watch.look(1, [0])
    assert watch.satisfied


def found_by(reference: ReferenceEngine, loaded: LoadedModel, switches: EfficiencySettings) -> tuple[str, list[str]]:
    """What calibration finds."""

    def respond(prefix: str) -> list[str]:
        return prefix_responses(after(reference, prefix), loaded.layers, switches, QUESTIONS)

    return detect_prefix(respond, reference.reader.markup)


def after(reference: ReferenceEngine, prefix: str) -> ReferenceEngine:
    """The same engine after another response prefix."""
    chat = PromptEncoder(reference.chat.tokenizer, CPU, prefix)
    return ReferenceEngine(
        reference.model, chat, reference.reader, max_new_tokens=reference.max_new_tokens, sizes=reference.sizes
    )


OWN = (demo_path() / "model" / "chat_template.jinja").read_text(encoding="utf-8")
THINKS = OWN + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
SWITCH = OWN + "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}"


def demo_with(template: str, folder: Path) -> str:
    """The demo model with another chat template."""
    shutil.copytree(demo_path() / "model", folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return str(folder)


def few(files: dict[str, str], tmp_path: Path, model: str, **over: Any) -> Any:
    """A short run, all of its trials random."""
    given: dict[str, Any] = {"model": model, "search": {"trials": 2, "startup_trials": 2}, "export": {"kind": "none"}}
    return quick_settings(files, tmp_path / "cache", **(given | over))


@pytest.mark.usefixtures("lean")
def test_a_run_of_a_thinking_template(prompt_files: dict[str, str], tmp_path: Path) -> None:
    """Engine and reference close the block the same way, and have the same trials; so does the template's own switch."""
    model = demo_with(SWITCH, tmp_path / "model")
    # What the demo model answers after a block isn't what it was trained to answer, so other markers.
    markers = tmp_path / "markers.txt"
    markers.write_text("the\nyou", encoding="utf-8")
    over = {"evaluation": {"markers": str(markers), "batch_size": 12}, "response": {"max_new_tokens": 12, "prefix_prompts": 4}}
    # For the same reason, whether they are real answers to the prompts isn't asked.
    search = {"trials": 2, "startup_trials": 2, "objectives": ["refusals", "kl"]}
    chosen = few(prompt_files, tmp_path, model, **over, search=search)
    fast, said = run_in(tmp_path / "fast", chosen)
    slow, _ = run_in(tmp_path / "slow", chosen.model_copy(update={"efficiency": chosen.efficiency.reference()}))
    assert any("template opens a thinking block <think>, which is skipped" in note for note in said.notes)
    assert any("enable_thinking (load.template_options)" in note for note in said.notes)
    prefix = next(note for note in said.notes if note.startswith("response prefix"))
    assert prefix.startswith("response prefix: '\\n</think>")
    for one, other in zip(fast["trials"], slow["trials"], strict=True):
        assert one["params"] == other["params"]
        assert one["scores"]["kl"]["mean"] == pytest.approx(other["scores"]["kl"]["mean"], rel=1e-3, abs=1e-5)
        assert one["state"] == "stopped" or one["scores"]["refusals"] == other["scores"]["refusals"]
        assert one["scores"]["refusals"] <= other["scores"]["refusals"]
    options = {"template_options": {"enable_thinking": False}}
    quiet = Recorder()
    load(few(prompt_files, tmp_path, model, load=options), quiet).close()
    assert quiet.notes
    assert not any("thinking" in note for note in quiet.notes)
    with pytest.raises(InputError, match=r"another .*set of template options"):
        run_in(tmp_path / "fast", few(prompt_files, tmp_path, model, load=options), resume=True)


@pytest.mark.usefixtures("lean")
def test_a_run_that_keeps_thinking(prompt_files: dict[str, str], tmp_path: Path) -> None:
    """The demo model never closes the block: all is thought, and that is said with its remedies."""
    response = {"thinking": "keep", "max_new_tokens": 4, "prefix_prompts": 4}
    kept = few(prompt_files, tmp_path, demo_with(THINKS, tmp_path / "model"), response=response)
    recorder = Recorder()
    with pytest.raises(AbliterateError):  # nothing refuses less
        run(kept, recorder, RunDirectory(tmp_path / "run"))
    assert any("kept: the response follows it, within response.max_new_tokens" in note for note in recorder.notes)
    assert not any("</think>" in note for note in recorder.notes)
    warning = next(warning for warning in recorder.warnings if "12 of 12 responses are still inside" in warning)
    assert "response.max_new_tokens=N" in warning
    assert "response.thinking=skip" in warning


# R1's first template opens no block; it takes closing tags out of earlier answers.
R1_FIRST = (
    "{% for m in messages %}{% set content = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}[{{ m['role'] }}]{{ content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[model]{% endif %}"
)
LONGCAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[model]{% if enable_thinking %}<longcat_think>\n{% endif %}{% endif %}"
    "{# an answer is cut behind </longcat_think> #}"
)


def shown_by(template: str, *tokens: str) -> Markup:
    """The markup for a model with this template and these tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = template
    return markup_of(load_settings("", {}), tokenizer)


@pytest.mark.parametrize(
    ("template", "tokens", "opening", "closing"),
    [
        (LONGCAT, (), "<longcat_think>", "</longcat_think>"),
        ("{{ messages }}", ("<longcat_think>", "</longcat_think>"), "<longcat_think>", "</longcat_think>"),
        ("{{ messages }}{# </my:reasoning> #}", (), "<my:reasoning>", "</my:reasoning>"),
        ("{{ messages }}", ("<|think_start|>", "<|think_end|>"), "<|think_start|>", "<|think_end|>"),
        (
            "{{ messages }}",
            ("<|begin_of_reasoning|>", "<|end_of_reasoning|>"),
            "<|begin_of_reasoning|>",
            "<|end_of_reasoning|>",
        ),
        ("{{ messages }}", ("[DEEP_THOUGHT]", "[/DEEP_THOUGHT]"), "[DEEP_THOUGHT]", "[/DEEP_THOUGHT]"),
    ],
)
def test_tags_are_found_where_the_model_shows_them(template: str, tokens: tuple[str, ...], opening: str, closing: str) -> None:
    markup = shown_by(template, *tokens)
    assert [block for block in markup.blocks if block.opening == opening and block.closing == closing]
    reader = ResponseReader(make_tokenizer(), markup)
    ids = make_tokenizer()(f"{opening}I cannot{closing}Sure.", add_special_tokens=False)["input_ids"]
    assert reader.read(ids) == Response("Sure.")


def test_only_thinking_tags_are_found() -> None:
    plain = shown_by("{{ messages }}</tool_call><|im_end|>", "<tool>", "</tool>", "<|end_of_reasoning|>")
    assert plain.blocks == MARKUP.blocks
    assert plain.unopened == ()
    own = load_settings("", {"response": {"thinking_blocks": [["<a>", "<a></a>"]]}})
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LONGCAT
    assert [block.opening for block in markup_of(own, tokenizer).blocks] == ["<a>"], "a list of one's own is kept"


@pytest.mark.parametrize(
    ("text", "expected", "is_open"),
    [
        ("Hm, I cannot</think>Sure.", "Sure.", False),
        ("Hm, I cannot</think>\n\nSure.</think> Or so.", "\n\nSure.</think> Or so.", False),  # only the first ends thinking
        ("Sure.", "Sure.", False),
        ("Sure. <think>I cannot</think>Yes.", "Sure. Yes.", False),
        ("<think>I cannot</think>Sure.", "Sure.", False),
        ("I cannot<answer>", "I cannot", False),
        ("<think>I cannot", "", True),
    ],
)
def test_a_closing_tag_that_nobody_opened_ends_thinking(text: str, expected: str, is_open: bool) -> None:
    markup, tokenizer = shown_by(R1_FIRST), make_tokenizer()
    reader = ResponseReader(tokenizer, markup)
    tokenizer.chat_template = R1_FIRST
    starts = reader.starts_open(PromptEncoder(tokenizer, CPU).tail(Prompt("Why?")))
    assert starts is None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reader.read(ids, starts_open=starts) == Response(expected, thinking_open=is_open)
    assert reader.starts_open("[/][model]<think></think>") is False
    assert reader.starts_open("[/][model]<think>\n") is True


@pytest.mark.parametrize(
    ("text", "expected", "is_open"),
    [
        ("<think>a<think>b</think>c</think>Sure.", "Sure.", False),
        ("<think>a<think>b<think>c</think>d</think>e</think>Sure.", "Sure.", False),
        ("<think>a<think>b</think>c<think>d</think>e</think>Sure.", "Sure.", False),
        ("[THINK]a[THINK]b[/THINK]c[/THINK]Sure.", "Sure.", False),
        ("<think>\n<think>\na</think>Sure.", "Sure.", False),  # a model that repeats the opening tag closes it once
        ("<think>a<think>b</think>c<think>d", "c", True),
        ("<think>a[THINK]b</think>Sure.", "Sure.", False),
        ("Yes. <think>a<think>b</think>c</think>Sure.", "Yes. Sure.", False),
    ],
)
def test_nested_blocks(text: str, expected: str, is_open: bool) -> None:
    tokenizer = make_tokenizer()
    reader = ResponseReader(tokenizer, MARKUP)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert reader.read(ids) == Response(expected, thinking_open=is_open)


def test_a_template_opens_a_block_that_the_model_opens_again() -> None:
    reader = ResponseReader(make_tokenizer(), MARKUP)

    def read(text: str) -> Response:
        return reader.read(make_tokenizer()(text, add_special_tokens=False)["input_ids"], starts_open=True)

    assert read("<think>a</think>Sure.") == Response("Sure.")
    assert read("<think>a</think>b</think>Sure.") == Response("Sure.")


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "<answer>", "No", " ", "<th", "ink>"])),
    is_open=st.sampled_from([True, False, None]),
)
def test_what_a_growing_response_shows_stays_whoever_closes(parts: list[str], is_open: bool | None) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    reader, listener = ResponseReader(tokenizer, Markup(DEFAULT.thinking_blocks, DEFAULT.answer_tags, ["</think>"])), Listener()
    growing = reader.watch(listener, starts_open=is_open)
    whole = reader.read(ids, starts_open=is_open).text
    for token in ids:
        growing.feed([token])
        assert whole.startswith(listener.text)


@pytest.mark.parametrize("unopened", [("s",), ("a", "io")])
def test_engine_reads_unopened_closings_as_the_reference_does(
    lab: tuple[LoadedModel, Editor], unopened: tuple[str, ...]
) -> None:
    loaded, editor = lab
    editor.clear()
    reference = reference_of(loaded, Markup([("e", "ea"), ("i", "io")], ["t", "n"], unopened))
    scorer = Refusals(["ra", "ve", "us"])
    setup = EngineSetup(reference, loaded.layers, editor.hooks, scorer, QUESTIONS, QUESTIONS, range(3))
    engine = setup.engine(EfficiencySettings())
    flags, thought = set(), False
    for seed in range(4):
        editor.apply(make_params(seed))
        expected, found = reference.respond(QUESTIONS), engine.respond(QUESTIONS)
        assert [scorer.is_refusal(one) for one in found or []] == [scorer.is_refusal(one) for one in expected or []]
        flags |= {scorer.is_refusal(one) for one in expected or []}
        for text in reference.raw_responses(QUESTIONS):
            visible = VisibleText(reference.reader.markup, is_open=None)
            visible.feed(text, last=True)
            thought = thought or visible.was_thinking
    assert flags == {True, False}
    assert thought


def test_a_chat_takes_back_what_was_thinking() -> None:
    tokenizer, pieces = make_tokenizer(), list[tuple[bool, str]]()
    reader = ResponseReader(tokenizer, shown_by(R1_FIRST))
    reading = _Reading(reader, tokenizer, None, "", lambda thinking, text: pieces.append((thinking, text)))
    for token in tokenizer("Hm, let me see.</think>\n\nSure.", add_special_tokens=False)["input_ids"]:
        reading.feed(token)
    reading.finish()
    assert pieces[0] == (False, "Hm"[: len(pieces[0][1])]), "it is shown as it comes"
    assert ("".join(reading.thinking), "".join(reading.answer)) == ("Hm, let me see.", "Sure.")
