"""Chat templates in the style of the families: what becomes of a system prompt, of parts, of options, of several templates.

The templates are our own, made to behave like those of the families they are named after.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import InputError
from abliterate.model import loader
from abliterate.model.chat_template import PromptEncoder, Template
from abliterate.model.loader import demo_path
from abliterate.pipeline.cache_keys import model_key
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.settings.sources import load_settings, parse_assignments
from abliterate.types import Prompt
from support.models import CPU, make_tokenizer
from support.runs import quick_settings, run_in
from support.templates import ASK, DROPS_SYSTEM, ONLY_LAST, REFUSES_SYSTEM, TURNS

QUESTION = Prompt("  Why is the sky blue?\n", "Be brief.")

OWN_SYSTEM = "{% if messages[0]['role'] != 'system' %}[system]You are Qwill.[/]{% endif %}" + TURNS + ASK
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}[/]{% endfor %}" + ASK
)
# A list is added to, so a string is a TypeError of Python's, not an error of the template's.
PARTS_BY_SUM = "{% for m in messages %}{% for part in [] + m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}" + ASK
PARTS_REFUSE_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PARTS
EITHER = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'][0]['text'] }} (part){% endif %}[/]{% endfor %}" + ASK
)
LOSES_THE_USER = "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}" + ASK
SWITCHED = (
    "{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}{{ bos_token }}" + TURNS + "[model]"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% if reasoning_effort %}"
    "({{ reasoning_effort }}){% endif %}{% if tools %}{{ tools }}{% endif %}"
    "{% set found = namespace(date=strftime_now('%Y')) %}{% generation %}{% for i in range(2) %}{% break %}{% endfor %}"
    "{% endgeneration %}"
)


def chat_with(template: Any, **options: Any) -> PromptEncoder:
    """A chat of the demo's tokenizer with another template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return PromptEncoder(tokenizer, CPU, options=options)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TURNS + ASK, "[system]Be brief.[/][user]Why is the sky blue?[/][model]"),
        (REFUSES_SYSTEM, "[user]Be brief.\n\n  Why is the sky blue?[/][model]"),
        (DROPS_SYSTEM, "[user]Be brief.\n\n  Why is the sky blue?\n[/][model]"),
        (ONLY_LAST, "[user]Be brief.\n\n  Why is the sky blue?\n[/][model]"),
        (OWN_SYSTEM, "[system]Be brief.[/][user]Why is the sky blue?[/][model]"),
        (PARTS, "[system]Be brief.[/][user]  Why is the sky blue?\n[/][model]"),
        (PARTS_BY_SUM, "Be brief.  Why is the sky blue?\n[model]"),
        (PARTS_REFUSE_SYSTEM, "[user]Be brief.\n\n  Why is the sky blue?\n[/][model]"),
        (EITHER, "[system]Be brief.[/][user]  Why is the sky blue?\n[/][model]"),
    ],
)
def test_nothing_of_a_prompt_gets_lost(template: str, expected: str) -> None:
    assert chat_with(template).render(QUESTION) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (REFUSES_SYSTEM, "[user]Why is the sky blue?[/][model]"),
        (DROPS_SYSTEM, "[user]  Why is the sky blue?\n[/][model]"),
        (OWN_SYSTEM, "[system]You are Qwill.[/][user]Why is the sky blue?[/][model]"),
        (PARTS, "[user]  Why is the sky blue?\n[/][model]"),
    ],
)
def test_without_a_system_prompt_the_template_decides(template: str, expected: str) -> None:
    chat = chat_with(template)
    prompt = Prompt(QUESTION.text)
    assert chat.render(prompt) == expected
    assert chat.form(prompt).note == ""


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (REFUSES_SYSTEM, "takes no system prompt (no system role)"),
        (PARTS_REFUSE_SYSTEM, "takes no system prompt (no system)"),
        (DROPS_SYSTEM, "leaves the system prompt out"),
        (ONLY_LAST, "leaves the system prompt out"),
        (OWN_SYSTEM, ""),
        (PARTS, ""),
        (EITHER, ""),
    ],
)
def test_a_moved_system_prompt_is_said(template: str, said: str) -> None:
    note = chat_with(template).form(QUESTION).note
    assert said in note
    assert bool(note) == bool(said)


@pytest.mark.parametrize("template", [LOSES_THE_USER, "always the same", "{{ raise_exception('never') }}"])
def test_a_lost_question_is_an_error(template: str) -> None:
    with pytest.raises(InputError, match=r"the user's text isn't in its output.*load\.chat_template") as caught:
        chat_with(template).render(QUESTION)
    assert ("(never)" in str(caught.value)) == ("never" in template)


def test_a_prompt_that_the_template_refuses_is_an_error() -> None:
    picky = "{% if 'sky' in messages[-1]['content'] %}{{ raise_exception('no skies') }}{% endif %}" + TURNS + ASK
    with pytest.raises(InputError, match=r"no skies.*load\.chat_template"):
        chat_with(picky).render(QUESTION)


def test_what_a_template_changes_in_a_text_is_not_lost() -> None:
    """The form is found with a probe: a template may take words out of a real prompt."""
    soft = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | replace('/think', '') }}[/]{% endfor %}" + ASK
    assert chat_with(soft).render(Prompt("Why? /think", "Be brief. /think")) == "[system]Be brief. [/][user]Why? [/][model]"


def test_options_of_a_template_are_what_nobody_else_sets() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = SWITCHED
    assert Template(tokenizer, {}).options == ("enable_thinking", "reasoning_effort")


def test_options_reach_the_template() -> None:
    assert chat_with(SWITCHED).render(QUESTION).endswith("[model]<think>\n")
    assert chat_with(SWITCHED, enable_thinking=False).render(QUESTION).endswith("</think>\n\n")
    assert chat_with(SWITCHED, reasoning_effort="low").render(QUESTION).endswith("(low)")


@pytest.mark.parametrize("name", ["enable_thinkin", "tools", "messages", "bos_token", "range"])
def test_an_option_that_a_template_lacks_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=f"no option {name} .*has enable_thinking, reasoning_effort"):
        chat_with(SWITCHED, **{name: True})
    with pytest.raises(InputError, match="it has none"):
        chat_with(TURNS, **{name: True})


def test_a_template_that_is_no_template() -> None:
    with pytest.raises(InputError, match=r"can't be read.*load\.chat_template"):
        chat_with("{% if %}")


def test_one_of_several_templates() -> None:
    assert chat_with({"default": TURNS + ASK, "tool_use": "tools"}).render(QUESTION).startswith("[system]")
    with pytest.raises(InputError, match=r"several chat templates \(rag, tool_use\) and no default"):
        chat_with({"tool_use": TURNS, "rag": TURNS})


def test_a_template_that_only_the_processor_reads(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_path() / "model", folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}), encoding="utf-8")
    tokenizer = loader.load_tokenizer(str(folder), LoadSettings())
    assert PromptEncoder(tokenizer, CPU).render(QUESTION) == "[system]Be brief.[/][user]  Why is the sky blue?\n[/][model]"
    for content in ("[]", "{", "{}"):
        (folder / "chat_template.json").write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match="has no chat template"):
            PromptEncoder(loader.load_tokenizer(str(folder), LoadSettings()), CPU)


def test_options_in_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse_assignments(["load.template_options.enable_thinking=false", "load.template_options.reasoning_effort=low"])
    assert load_settings("", given).load.template_options == {"enable_thinking": False, "reasoning_effort": "low"}
    monkeypatch.setenv("ABLITERATE_LOAD__TEMPLATE_OPTIONS__ENABLE_THINKING", "False")
    monkeypatch.setenv("ABLITERATE_LOAD__TEMPLATE_OPTIONS__BUDGET", "512")
    options = load_settings("", {}).load.template_options
    assert options["enable_thinking"] is False  # a string would be true to a template
    assert str(options["budget"]) == "512"
    assert Settings(load=LoadSettings(template_options={"n": 3, "x": 0.5})).load.template_options == {"n": 3, "x": 0.5}


@pytest.mark.parametrize("asked", ["think", "<think>", "[model]", "Why?"])
def test_the_tail_is_what_the_template_puts_after_the_question(asked: str) -> None:
    opening = chat_with(TURNS + "[model]{{ '<think>\n' }}")
    assert opening.tail(Prompt(asked, "Use <think> first.")) == "[/][model]<think>\n"
    opening.response_prefix = "\n</think>"
    assert opening.tail(Prompt(asked, "Use <think> first.")) == "[/][model]<think>\n\n</think>"


def test_a_tail_that_depends_on_the_question() -> None:
    soft = TURNS + "[model]{% if '/deep' in messages[-1]['content'] %}<think>\n{% endif %}"
    assert chat_with(soft).tail(Prompt("Why? /deep")) == "[/][model]<think>\n"
    assert chat_with(soft).tail(Prompt("Why?")) == "[/][model]"


def test_a_rendering_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after midnight has the prompts it began with."""
    dated = chat_with("[{{ strftime_now('%H:%M:%S.%f') }}]" + TURNS + ASK)
    assert dated.render(QUESTION) == dated.render(QUESTION)
    assert dated.render(QUESTION) != chat_with("[{{ strftime_now('%H:%M:%S.%f') }}]" + TURNS + ASK).render(QUESTION)


def test_rendering_and_options_are_in_the_keys_of_artifacts() -> None:
    source = str(demo_path() / "model")
    tokenizer = loader.load_tokenizer(source, LoadSettings())
    loaded = type("Loaded", (), {"tokenizer": tokenizer, "device": CPU})()
    loaded.info = type("Info", (), dict.fromkeys(("id", "revision", "fingerprint", "dtype", "quantization"), ""))()
    loaded.model = type("Model", (), {"config": type("Config", (), {"_attn_implementation": "sdpa"})()})()
    loaded.architecture = type("Architecture", (), {"layers": "model.layers"})()

    def key(template: str, **options: Any) -> dict[str, Any]:
        tokenizer.chat_template = template
        return model_key(Settings(load=LoadSettings(template_options=options)), loaded)

    assert key(SWITCHED) == key(SWITCHED)
    assert key(SWITCHED, enable_thinking=False) != key(SWITCHED)
    dated = "[{{ strftime_now('%H:%M:%S.%f') }}]" + TURNS + ASK
    assert key(dated)["chat_template"] == key(dated)["chat_template"]
    assert key(dated)["rendering"] != key(dated)["rendering"]


@pytest.mark.usefixtures("lean")
def test_a_run_says_where_the_system_prompt_went(prompt_files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "no_system.jinja"
    own = (demo_path() / "model" / "chat_template.jinja").read_text(encoding="utf-8")
    path.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + own, encoding="utf-8")
    load, none = {"chat_template": str(path)}, {"kind": "none"}
    settings = quick_settings(prompt_files, tmp_path / "cache", load=load, export=none)
    _, recorder = run_in(tmp_path / "run", settings)
    said = [note for note in recorder.notes if "the system prompt is put before the user's text" in note]
    assert len(said) == 1


def test_a_timer_of_the_programs_own_goes_on() -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        Template(make_tokenizer(), {}).render([{"role": "user", "content": "Hi"}])
        end = time.monotonic() + 5
        while not rang and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rang == [1]


def test_a_tokenizer_without_pad_and_end_tokens() -> None:
    """Pads are masked and repeat the row's first token, so none is needed."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    chat = PromptEncoder(tokenizer, CPU)
    short, long = Prompt("Hi", ""), Prompt("How do I rinse a carpet?", "")
    batch, rows = chat.encode([short, long]), [chat.token_ids(short), chat.token_ids(long)]
    pads = len(rows[1]) - len(rows[0])
    assert batch["input_ids"].tolist() == [[rows[0][0]] * pads + rows[0], rows[1]]
    assert batch["attention_mask"].tolist() == [[0] * pads + [1] * len(rows[0]), [1] * len(rows[1])]
