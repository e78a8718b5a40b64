"""The base's licence, languages and tags stand in the export's card, whatever its author wrote there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.repocard import metadata_load

from abliterate.export import base_card, model_card
from abliterate.export.base_card import front_matter
from abliterate.settings.schema import LoadSettings
from support.exports import CARD_FACTS


def of(folder: Path, text: str) -> Any:
    """The front matter of an export whose base has a card with this front matter."""
    (folder / "README.md").write_text(f"---\n{text}\n---\n\n# The base\n", encoding="utf-8")
    card = model_card(CARD_FACTS | {"dense": True} | {"base_card": front_matter(str(folder), LoadSettings())})
    assert card.startswith("---\n")
    (folder / "export.md").write_text(card, encoding="utf-8")
    return metadata_load(folder / "export.md")


OWN = {"base_model": "owner/name", "tags": ["abliterated", "abliterate"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        (
            "license: other\nlicense_name: llama3.2\nlicense_link: 'https://example.org/a: b#c'\nlanguage:\n- en\n- de",
            {
                "license": "other",
                "license_name": "llama3.2",
                "license_link": "https://example.org/a: b#c",
                "language": ["en", "de"],
            },
        ),
        ("language: [no, yes, zh]", {"language": ["no", "zh"]}),
        ("language: ja\ntags: [chat, abliterate, 'a: b']", {"language": "ja", "tags": [*OWN["tags"], "chat", "a: b"]}),
        ("tags: chat", {"tags": [*OWN["tags"], "chat"]}),
        ("pipeline_tag: text-generation\nbase_model: somebody/else\nwidget: [x]", {}),
    ],
)
def test_fields_of_the_base(text: str, expected: dict[str, Any], tmp_path: Path) -> None:
    assert of(tmp_path, text) == OWN | expected


@pytest.mark.parametrize(
    "text",
    [
        "license: [",
        "- a list",
        "license: {a: b}\nlanguage: 5\ntags: [[x], {y: z}, 3, null]",
        "license: 2024-01-01",
        f"license: {'x' * 1000}",
        'license: "a\\nb"\ntags: ["\\u2028"]',
        "tags: &a [*a]",
        "tags: " + "[" * 500,
        "license: !!python/object/apply:os.system ['false']",
    ],
)
def test_odd_front_matter_is_left_out(text: str, tmp_path: Path) -> None:
    assert of(tmp_path, text) == OWN


def test_no_card_no_fields(tmp_path: Path) -> None:
    assert front_matter(str(tmp_path), LoadSettings()) == {}
    (tmp_path / "README.md").write_text("# No front matter", encoding="utf-8")
    assert front_matter(str(tmp_path), LoadSettings()) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert front_matter(str(tmp_path), LoadSettings()) == {}


def test_the_card_of_a_hub_model_is_that_of_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")

    def fetch(source: str, load: LoadSettings, name: str, *, optional: bool) -> Path:
        assert (source, load.revision, name, optional) == ("owner/name", "abc", "README.md", True)
        return tmp_path / name

    monkeypatch.setattr(base_card, "fetched", fetch)
    monkeypatch.setattr(base_card, "skip_retries_without_network", lambda: None)
    assert front_matter("owner/name", LoadSettings(revision="abc")) == {"license": "mit"}


@pytest.mark.parametrize(("kind", "said"), [("dora", (True, True)), ("lora", (True, False)), ("", (False, False))])
def test_the_card_says_who_loads_an_adapter(kind: str, said: tuple[bool, bool]) -> None:
    text = " ".join(model_card(CARD_FACTS | {"dense": True} | {"adapter": kind}).split())
    assert ("PeftModel.from_pretrained" in text, "vLLM and llama.cpp don't load" in text) == said
    assert ("--set edit.mode=pre" in text) is (kind == "dora")
