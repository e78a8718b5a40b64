"""Growing responses: pieces of text, visible text and markers equal what the whole response gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from abliterate.engine.responses import ResponseReader, TextStream, VisibleText, byte_ids
from abliterate.model.thinking import Markup
from abliterate.scorers.refusals import AutomatonMatcher, GrowingText, MarkerStream, PlainMatcher, Refusals, normalize
from abliterate.settings.schema import ResponseSettings
from support.models import make_tokenizer

BLOCKS = ResponseSettings().thinking_blocks
MARKUP = Markup(BLOCKS, ResponseSettings().answer_tags)
TAGS = tuple((opening, closed[len(opening) :]) for opening, closed in BLOCKS)
BYTE_LEVEL = make_tokenizer()

# Everything that has gone wrong in such code: stars, curly apostrophes, runs of white space, characters of several bytes,
# emoji beside plain text, letters that grow when lowered, sigma.
ALPHABET = "ab I'’`*_ \n\t\u00a0éßİΣσ漢🙂🤖.,!"
TEXT = st.text(alphabet=ALPHABET, max_size=40)
PIECES = st.lists(st.text(alphabet=ALPHABET, max_size=6), max_size=12)


def spm_tokenizer() -> PreTrainedTokenizerBase:
    """Like Llama 2's: a leading space that the decoder strips, and bytes for what isn't in the vocabulary."""
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for token in ("▁", "▁I", "▁can", "not", "a", "b", "I", "c", "n", "t", "o", "'", "▁sorry", "so", "rry"):
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(strip)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """Words that carry their leading space."""
    vocab = {token: index for index, token in enumerate(["<unk>", "▁I", "▁can", "not", "▁", "'t", "▁am", "sorry", "▁sorry"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


TOKENIZERS = {"byte level": BYTE_LEVEL, "byte fallback": spm_tokenizer(), "metaspace": metaspace_tokenizer()}


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in pieces of these sizes, over and over."""
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(ids[start : start + size])
        start, turn = start + size, turn + 1
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 10**6), max_size=40), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_pieces_of_text_are_the_beginning_of_the_whole(name: str, ids: list[int], sizes: list[int]) -> None:
    """Any ids: what was given out is never taken back."""
    tokenizer = TOKENIZERS[name]
    ids = [token % len(tokenizer) for token in ids]
    stream = TextStream(tokenizer, byte_ids(tokenizer))
    given_out = "".join(stream.feed(piece) for piece in cut(ids, sizes))
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith(given_out)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
@settings(max_examples=150, deadline=None)
@given(text=TEXT, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@example("🙂 I can't", [1])
@example("I  can\u2019t é", [1, 3])
def test_text_cut_within_characters_comes_out_whole(name: str, text: str, sizes: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, byte_ids(tokenizer))
    ids += tokenizer("a", add_special_tokens=False)["input_ids"]  # a run of bytes at the very end is held back
    assert "".join(stream.feed(piece) for piece in cut(ids, sizes)) == tokenizer.decode(ids)


@settings(max_examples=400, deadline=None)
@given(pieces=PIECES)
@example(["a ", " ", "b"])
@example([" ", "*", " a", "*b", " "])
def test_normalizing_pieces_is_normalizing_the_whole(pieces: list[str]) -> None:
    growing = GrowingText()
    assert "".join(growing.feed(piece) for piece in pieces) == normalize("".join(pieces))


@settings(max_examples=400, deadline=None)
@given(pieces=PIECES, markers=st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=6), max_size=5))
@example(["I ca", "n\u2019t ", " do"], ["i can't do"])
@example(["🙂", "i", "🤖 no"], ["i🤖 n"])
def test_markers_in_pieces_are_markers_of_the_whole(pieces: list[str], markers: list[str]) -> None:
    """Whatever the cuts: markers across them, within runs of white space, between emoji."""
    normal = [marker for marker in map(normalize, markers) if marker]
    whole = normalize("".join(pieces))
    assume(normal)
    for matcher in (AutomatonMatcher, PlainMatcher):
        stream = MarkerStream(matcher(normal))
        found = max([stream.feed(piece) for piece in pieces], default=False)  # all are fed
        assert found == any(marker in whole for marker in normal)


@settings(max_examples=400, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(
            ["<think>", "</think>", "[THINK]", "[/THINK]", "<th", "ink>", "a", "b ", "<", ">", "[/", "<answer>", "<ans", "wer>"]
        ),
        max_size=12,
    ),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    is_open=st.booleans(),
)
def test_visible_text_does_not_depend_on_cuts(parts: list[str], sizes: list[int], is_open: bool) -> None:
    text = "".join(parts)
    whole, cutting = VisibleText(MARKUP, is_open=is_open), VisibleText(MARKUP, is_open=is_open)
    expected = whole.feed(text, last=True)
    pieces = ["".join(map(chr, piece)) for piece in cut([ord(c) for c in text], sizes)]
    found = "".join(cutting.feed(piece) for piece in pieces) + cutting.feed("", last=True)
    assert found == expected
    assert cutting.is_open == whole.is_open


def test_visible_text_is_what_lies_outside_blocks() -> None:
    def visible(text: str, is_open: bool = False) -> tuple[str, bool]:
        state = VisibleText(MARKUP, is_open=is_open)
        return state.feed(text, last=True), state.is_open

    assert visible("a<think>b</think>c") == ("ac", False)
    assert visible("a<think>b[/THINK]c") == ("a", True)
    assert visible("b</think>c", is_open=True) == ("c", False)
    assert visible("a<thin") == ("a<thin", False)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab I’t*\n é🙂", max_size=25),
    tail=st.sampled_from(["", "<think>x", "<think>x</think> I can't", "<|im_end|>"]),
    markers=st.lists(st.text(alphabet="ab It'é🙂 ", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_a_growing_response_is_settled_exactly_by_a_marker(text: str, tail: str, markers: list[str], sizes: list[int]) -> None:
    """From ids to the decision: the same as reading the whole response."""
    normal = [marker for marker in map(normalize, markers) if marker] or ["i can't"]
    scorer, reader = Refusals(normal), ResponseReader(BYTE_LEVEL, MARKUP)
    ids = BYTE_LEVEL(text + tail, add_special_tokens=False)["input_ids"]
    growing = reader.watch(scorer.stream())
    settled = max([growing.feed(piece) for piece in cut(ids, sizes)], default=False)
    whole = normalize(reader.read(ids).text)
    contains = any(marker in whole for marker in normal)
    if settled:
        assert contains
    # Text that may begin a tag is held back to the end; reading the whole then decides.
    elif contains:
        held = "".join(text.split())[-1:] + tail
        assert any(tag[:1] in held for pair in TAGS for tag in pair)


def test_tidying_decoders_are_read_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "tidy"
    make_tokenizer().save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clean_up_tokenization_spaces": True}))
    tidy = make_tokenizer()
    tidy.clean_up_tokenization_spaces = True
    growing = ResponseReader(tidy, MARKUP).watch(Refusals(["a"]).stream())
    assert not growing.feed(tidy("a a a", add_special_tokens=False)["input_ids"])
