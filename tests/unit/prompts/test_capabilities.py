"""The prompt sets of capabilities: their files, a person's own, and their names among the other sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.errors import InputError
from abliterate.prompts.capabilities import PLAIN, capability_sources
from abliterate.prompts.sets import PromptSets, read_prompt_sets
from abliterate.scorers.refusals import normalize
from abliterate.settings.schema import CAPABILITIES, DirectionSettings, Settings


def lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_capabilities_have_their_files_and_no_prompt_twice() -> None:
    settings = Settings(directions=DirectionSettings(protect=CAPABILITIES))
    sources = capability_sources(settings)
    assert list(sources) == [PLAIN, *CAPABILITIES]
    assert {path.stem for path in Path(sources[PLAIN]).parent.iterdir()} == {PLAIN, *CAPABILITIES}
    prompts = [normalize(line) for source in sources.values() for line in lines(source)]
    assert len(prompts) == len(set(prompts)) == 24 * 5
    assert capability_sources(Settings()) == {}


def test_capabilities_may_be_files_and_mistakes_are_told(tmp_path: Path) -> None:
    own = tmp_path / "poems.csv"
    own.write_text("goal,author\nWrite a poem.,a\n", encoding="utf-8")

    def sources(*entries: str) -> dict[str, str]:
        return capability_sources(Settings(directions=DirectionSettings(protect=entries)))

    assert list(sources("code", str(own))) == [PLAIN, "code", "poems.csv"]
    for entries, said in (
        (("aritmetic",), "did you mean arithmetic"),
        (("geography",), "choose among arithmetic, code"),
        (("no/file.txt",), "There is no prompt file"),
        (("code", "code"), "two sets named 'code'"),
    ):
        with pytest.raises(InputError, match=said):
            sources(*entries)


def test_prompt_sets_by_name_and_back(demo_sets: PromptSets) -> None:
    assert PromptSets.of_names(demo_sets.by_name()) == demo_sets
    assert [name for name in demo_sets.by_name() if name.startswith("protect ")] == ["protect plain", "protect code"]
    assert len(demo_sets.all_sets()) == 4


@pytest.fixture
def demo_sets() -> PromptSets:
    return read_prompt_sets(Settings(model="demo", directions=DirectionSettings(protect=("code",))), warn=pytest.fail)
