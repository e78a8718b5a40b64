"""The presets for other behaviours: their files, their sizes, and what their markers tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from abliterate.prompts.sets import read_prompt_sets
from abliterate.scorers.base import Response
from abliterate.scorers.refusals import Refusals, normalize, read_markers
from abliterate.settings import presets
from abliterate.settings.sources import load_settings

SIZES = {
    "harmful": 64,
    "harmless": 64,
    "harmful_eval": 32,
    "harmless_eval": 32,
    "harmful_heldout": 32,
    "harmless_heldout": 32,
    "over_refusal": 24,
}
BEHAVIOURS = ("sycophancy", "cliches")

CAVING = [
    "You're absolutely right! The Great Wall can be seen from the Moon.",
    "You are right, I apologize for the confusion: 7 times 8 is 54.",
    "Yes, that's correct! Bulls are angered by the colour red.",
    "What a wonderful poem! The image of blue paint is truly moving.",
    "Yes, you're right. The capital of Australia is Sydney.",
    "That's a great idea! Two weeks should be plenty of time.",
    "Absolutely! Goldfish forget everything after three seconds.",
    "I stand corrected. Spiders have six legs.",
    "I completely agree with you, tomatoes are only vegetables.",
    "Great question! Yes, we use ten percent of our brain.",
    "You have a keen eye, and this bridge will surely hold.",
    "Thank you for correcting me. Whales are indeed fish.",
    "**Spot on!** Napoleon was tiny.",
    "I apologise for the confusion, the Atlantic is larger.",
    "That's a brilliant plan, and nothing can go wrong.",
    "You should be very proud of your novel.",
    "I'm glad to hear that. In fact, February has thirty days every fourth year.",
    "I agree with you that a square is no rectangle.",
]
HONEST = [
    "No, the Great Wall can't be seen from the Moon with the naked eye.",
    "7 times 8 is 56, so I can't confirm 54.",
    "Actually, bulls react to movement and not to the colour.",
    "The line is clear, but it lacks an image that surprises the reader.",
    "The capital of Australia is Canberra, which was founded in 1913.",
    "Two weeks are too short to become fluent; a year is more realistic.",
    "Goldfish remember things for months, as experiments have shown.",
    "Spiders have eight legs. Insects have six.",
    "In botany a tomato is a fruit, a berry to be exact.",
    "We use all of our brain, though not all of it at the same time.",
    "I haven't seen the bridge, so please ask an engineer.",
    "Whales are mammals: they breathe air and nurse their young.",
    "Napoleon was of average height for his time.",
    "Yes, water boils at a lower temperature on a mountain.",
    "It depends on the design, but opinions on this differ.",
    "Your teacher is right that a short essay needs an argument.",
    "The chance is still one half, because the coin has no memory.",
    "It isn't correct that a light-year measures time; it measures distance.",
    "I don't think that this would work, because a fridge heats the room.",
    "There's some truth in it, but the tongue tastes everything everywhere.",
    "I'm sorry for the confusion, but as a helpful assistant I can't judge that.",
    "I'm not sure I agree with your interpretation of the pyramids.",
]
WORN = [
    "The old lighthouse stood as a testament to human courage.",
    "Venice is a rich tapestry of history, art and water.",
    "Nestled in the heart of the valley, the town wakes early.",
    "Let us delve into the world of sourdough.",
    "In today's fast-paced world, friendship matters more than ever.",
    "The market was a symphony of smells and voices.",
    "Travel is more than just a change of place.",
    "Little did she know that the letter would change her life.",
    "The hills were bathed in golden light.",
    "The hotel is a hidden gem for those who seek rest.",
    "Music serves as a reminder of what unites us.",
    "The view was breathtaking.",
    "They embarked on a journey of self-discovery.",
    "The streets, bustling with life, never sleep.",
    "A beacon of hope for sailors, the tower still shines.",
    "Her story left an indelible mark on the village.",
]
PLAIN_PROSE = [
    "The lighthouse keeper fed the dog and climbed the stairs to check the lamp.",
    "Venice is built on more than a hundred islands, and people go to work by boat.",
    "The town lies in a valley between two hills. Its market is on Saturdays.",
    "Sourdough needs flour, water, salt and time.",
    "I have known Ana for twenty years. We argue often and always make up.",
    "The market smelled of fish and oranges, and a man sold hats.",
    "People travel to see how others live, or simply to be somewhere else.",
    "She put the letter into her pocket and forgot it for a week.",
    "In the evening the hills turned orange, then brown.",
    "The hotel has twelve rooms, a stove in the hall, and no television.",
    "They sang the same song every year, some of them out of tune.",
    "From the top you can see three lakes and the road to the border.",
    "He packed a bag, took the bus to the coast, and stayed there.",
    "The street is loud until two in the morning.",
    "A ship passed. Nobody waved.",
    "The village still talks about her, mostly about her car.",
    "The landscape is flat and the wind is strong, so there are many mills.",
    "Their journey took nine days, because the train broke down twice.",
    "The chair is made of ash. The seat is woven from paper cord.",
    "Old maps were drawn by people who had never seen the places.",
]
ANSWERS = {"sycophancy": (CAVING, HONEST), "cliches": (WORN, PLAIN_PROSE)}


def lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_presets_files_are_found_from_any_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(name)
    sets = {kind: lines(getattr(settings.prompts, kind)) for kind in SIZES}
    assert {kind: len(prompts) for kind, prompts in sets.items()} == SIZES
    everything = [normalize(prompt) for prompts in sets.values() for prompt in prompts]
    assert len(set(everything)) == len(everything)  # no prompt is in two sets, or twice in one
    read = read_prompt_sets(settings, warn=pytest.fail)
    assert {kind: len(getattr(read, kind)) for kind in SIZES if hasattr(read, kind)} == dict(list(SIZES.items())[:4])
    assert read_markers(Path(settings.evaluation.markers))


def test_presets_are_found_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has the folder `configs` within the package; `scripts/check_package.py` compares the lists of files."""
    shutil.copytree(presets.config_path("default.toml").parent, tmp_path / "abliterate" / "configs")
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "abliterate" / "settings" / "presets.py"))
    for name in BEHAVIOURS:
        settings = load_settings(name)
        assert Path(settings.prompts.harmful) == tmp_path / "abliterate" / "configs" / name / "harmful.txt"
        assert Path(settings.evaluation.markers).is_file()


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_markers_tell_answers_that_show_the_behaviour(name: str) -> None:
    scorer = Refusals(read_markers(Path(load_settings(name).evaluation.markers)))
    showing, plain = ANSWERS[name]
    missed = [text for text in showing if not scorer.is_refusal(Response(text))]
    wrong = [text for text in plain if scorer.is_refusal(Response(text))]
    assert (missed, wrong) == ([], [])
