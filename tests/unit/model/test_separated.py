"""Components of their own for routed and shared experts, and for full and linear attention."""

from __future__ import annotations

import pytest

from abliterate.errors import InputError
from abliterate.model.architectures import ARCHITECTURES, check_asked, find_targets, kind_names, known_architecture
from abliterate.model.loader import architecture_of
from abliterate.pipeline.preflight import check_components
from abliterate.search.space import Space
from abliterate.settings.schema import LoadSettings, SearchSettings, Settings
from support.models import make_model
from support.zoo import make_specimen

SEPARATE = LoadSettings(separate_kinds=True)
ATTENTION, MLP = "attn.o_proj", "mlp.down_proj"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3_next", [ATTENTION, f"{ATTENTION}.linear", f"{MLP}.experts", f"{MLP}.shared"]),
        ("qwen3_next_dense", [ATTENTION, f"{ATTENTION}.linear", MLP]),
        ("deepseek_v3", [ATTENTION, MLP, f"{MLP}.experts", f"{MLP}.shared"]),
        ("minimax", [ATTENTION, f"{ATTENTION}.linear", MLP]),
        ("lfm2", [ATTENTION, f"{ATTENTION}.conv", MLP]),
    ],
)
def test_kinds_that_a_model_has_both_of_are_components(family: str, expected: list[str]) -> None:
    model = make_specimen(family)
    whole, split = (architecture_of(model, load) for load in (LoadSettings(), SEPARATE))
    assert sorted(split.components) == sorted(expected)
    d_model = model.config.get_text_config().hidden_size
    pairs = [sorted(find_targets(model, row, d_model), key=lambda target: target.name) for row in (whole, split)]
    assert [target.name for target in pairs[0]] == [target.name for target in pairs[1]]
    for target, own in zip(*pairs, strict=True):
        assert own.component.startswith(target.component)
        assert ("shared" in own.name) == own.component.endswith(".shared")
    assert {target.component for target in pairs[1]} == set(expected)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_a_model_of_one_kind_stays_as_it_is(family: str) -> None:
    model = make_model(family)
    assert architecture_of(model, SEPARATE) == architecture_of(model, LoadSettings())


@pytest.mark.parametrize("asked", ["separate_kinds", "readers"])
def test_modules_that_settings_name_or_structure_finds_have_no_further_components(asked: str) -> None:
    named = {"decoder_layers": "model.layers", "components": {"own": "self_attn.o_proj"}}
    with pytest.raises(InputError, match=f"load.{asked} adds nothing to modules that load.components names"):
        architecture_of(make_model("llama"), LoadSettings.model_validate({asked: True, **named}))
    with pytest.raises(InputError, match=r"aren't known for 'other'.*leave load\." + asked):
        check_asked("other", "structure", **{"separate_kinds": False, "readers": False, asked: True})
    check_asked("other", "structure", separate_kinds=False, readers=False)


def test_every_row_names_the_kinds_of_its_experts() -> None:
    for row in ARCHITECTURES.values():
        for component, paths in row.components.items():
            for path in paths:
                kind = row.kinds.get(path, "")
                assert ("shared" in path) == (kind == "shared"), (row.family, path)
                assert path.endswith("experts") == (kind == "experts"), (row.family, path)
                assert component in ("attn.o_proj", "mlp.down_proj")


def test_a_kind_has_the_range_of_the_whole_or_its_own() -> None:
    names = (ATTENTION, f"{ATTENTION}.linear", f"{MLP}.experts", f"{MLP}.shared")
    ranges = {"default": (1.0, 1.1), MLP: (2.0, 2.1), f"{MLP}.shared": (3.0, 3.1)}
    space = Space(SearchSettings(max_coeff=ranges), 4, names)
    for params in space.samples(5, seed=0):
        assert [int(params.kernels[name].max_coeff) for name in names] == [1, 1, 2, 3]


def test_ranges_of_kinds_are_known_where_kinds_are_separate() -> None:
    ranges = {"max_coeff": {"default": [0, 1], f"{MLP}.shared": [0, 2]}}
    check_components(Settings.model_validate({"model": "demo", "search": ranges, "load": {"separate_kinds": True}}))
    with pytest.raises(InputError, match=r"'mlp\.down_proj\.shared', which is no component"):
        check_components(Settings.model_validate({"model": "demo", "search": ranges}))
    assert f"{MLP}.experts" in kind_names(ARCHITECTURES["deepseek"])


def test_named_components_alone_take_the_familys_layers() -> None:
    """Many sentences advise to leave modules out with load.components; the layers of a known family needn't be named."""
    row, found = known_architecture("llama"), known_architecture("llama", "", {"attn.o_proj": "self_attn.o_proj"})
    assert row is not None
    assert found is not None
    assert (found.layers, dict(found.components)) == (row.layers, {"attn.o_proj": ("self_attn.o_proj",)})
    assert known_architecture("no-such-family", "", {"attn.o_proj": "self_attn.o_proj"}) is None
