"""Settings: precedence, ranges, the sentences about mistakes, and the files in `configs/`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from abliterate.errors import InputError
from abliterate.files import read_toml
from abliterate.settings.schema import EfficiencySettings, SearchSettings, Settings
from abliterate.settings.sources import (
    config_path,
    dump_settings,
    load_settings,
    merge,
    option_names,
    options_of,
    parse_assignments,
)

CONFIGS = sorted(config_path("default.toml").parent.glob("*.toml"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("ABLITERATE_"):
            monkeypatch.delenv(name)


def write(folder: Path, content: str) -> str:
    path = folder / "own.toml"
    path.write_text(content, encoding="utf-8")
    return str(path)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of a nested dictionary; tables that are options themselves stay whole."""
    names, found = set(option_names()), {}
    for name, value in values.items():
        dotted = prefix + name
        if isinstance(value, dict) and dotted not in names:
            found |= flat(value, dotted + ".")
        else:
            found[dotted] = value
    return found


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, "seed = 1\n[search]\ntrials = 10\nei_candidates = 11\n")
    monkeypatch.setenv("ABLITERATE_SEARCH__TRIALS", "25")
    monkeypatch.setenv("ABLITERATE_SEED", "2")
    loaded = load_settings(config, {"search": {"trials": 30}})
    assert loaded.search.trials == 30  # command line
    assert loaded.seed == 2  # environment
    assert loaded.search.ei_candidates == 11  # file
    assert loaded.search.select == "auto"  # default


def test_each_source_beats_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().search.trials == 10
    config = write(tmp_path, "[search]\ntrials = 15\n")
    assert load_settings(config).search.trials == 15
    monkeypatch.setenv("ABLITERATE_SEARCH__TRIALS", "25")
    assert load_settings(config).search.trials == 25


def test_stored_settings_are_the_lowest_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "settings.toml"
    first = {"seed": 1, "search": {"trials": 10, "ei_candidates": 11, "max_coeff": {"default": [0.1, 0.2], "x": [1.0, 2.0]}}}
    stored.write_text(dump_settings(load_settings("", first)), encoding="utf-8")
    config = write(tmp_path, "[search]\ntrials = 25\nmax_coeff = {default = [0.5, 0.6]}\n")
    monkeypatch.setenv("ABLITERATE_EVALUATION__BATCH_SIZE", "7")
    loaded = load_settings(config, {"search": {"select": "knee"}}, stored=stored)
    assert (loaded.seed, loaded.search.ei_candidates) == (1, 11)
    assert (loaded.search.trials, loaded.evaluation.batch_size, loaded.search.select) == (25, 7, "knee")
    assert loaded.search.max_coeff == {"default": (0.5, 0.6)}  # a table is one option
    assert load_settings(config, stored={"seed": 3, "search": {"trials": 4}}).seed == 3


def test_a_table_is_replaced_as_a_whole_by_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, '[load]\nrevision = "v2"\ncomponents = {"attn.o_proj" = "o", "mlp.down_proj" = "d"}\n')
    assert len(load_settings(config).load.components) == 2
    monkeypatch.setenv("ABLITERATE_LOAD__COMPONENTS", '{"attn.o_proj": "by the environment"}')
    assert load_settings(config).load.components == {"attn.o_proj": "by the environment"}
    given = load_settings(config, parse_assignments(['load.components={"mlp.down_proj"="by a person"}'])).load
    assert (given.components, given.revision) == ({"mlp.down_proj": "by a person"}, "v2")
    assert load_settings(config, {"load": {"components": {}}}).load.components == {}


def test_entries_of_a_table_are_added_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, "[load]\ntemplate_options = {a = 1, b = 2}\n[search]\nmax_coeff = {default = [0.1, 0.2]}\n")
    given = parse_assignments(["load.template_options.b=3", "load.template_options.c=true"])
    assert load_settings(config, given).load.template_options == {"a": 1, "b": 3, "c": True}
    assert load_settings(config, parse_assignments(["load.template_options={c=true}"])).load.template_options == {"c": True}
    monkeypatch.setenv("ABLITERATE_SEARCH__MAX_COEFF__MLP.DOWN_PROJ", "[0.5, 0.6]")
    assert load_settings(config).search.max_coeff == {"default": (0.1, 0.2), "mlp.down_proj": (0.5, 0.6)}
    assert load_settings("").search.max_coeff == {"default": (0.8, 1.5), "mlp.down_proj": (0.5, 0.6)}, "to the default, too"
    entry = parse_assignments(["search.max_coeff.default=[0, 1]"])
    assert load_settings("", entry).search.max_coeff == {"default": (0, 1), "mlp.down_proj": (0.5, 0.6)}
    for name in ("search.select.x=1", "search.trials.x=1", "seed.x=1"):  # of an option that is no table
        with pytest.raises(InputError):
            load_settings(write(tmp_path, 'seed = 1\n[search]\ntrials = 9\nselect = "knee"\n'), parse_assignments([name]))


def test_paths_are_stored_absolute_and_names_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("p.txt", "m.txt", "c.jinja"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "demo").mkdir()
    dataset = "owner/name:train[:400]:text"
    paths = load_settings(
        "",
        {
            "model": "model",
            "cache_dir": "cache",
            "prompts": {"harmful": "p.txt", "harmless": dataset, "harmful_eval": "no/such.txt"},
            "evaluation": {"markers": "m.txt"},
            "load": {"chat_template": "c.jinja"},
            "search": {"storage": "sqlite:///study.db"},
        },
    )
    assert (paths.model, paths.cache_dir) == (str(tmp_path / "model"), str(tmp_path / "cache"))
    assert paths.prompts.harmful == str(tmp_path / "p.txt")
    assert (paths.prompts.harmless, paths.prompts.harmful_eval, paths.prompts.harmless_eval) == (dataset, "no/such.txt", "")
    assert (paths.evaluation.markers, paths.load.chat_template) == (str(tmp_path / "m.txt"), str(tmp_path / "c.jinja"))
    assert paths.search.storage == f"sqlite:///{tmp_path}/study.db"
    assert paths.efficiency.residual_cache_dir == ""
    for name in ("demo", "owner/name"):
        assert load_settings("", {"model": name}).model == name
    for url in ("", "postgresql://host/db", f"sqlite:///{tmp_path}/study.db"):
        assert load_settings("", {"search": {"storage": url}}).search.storage == url


def test_environment_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_MODEL", "demo")
    monkeypatch.setenv("ABLITERATE_SEARCH__POSITION", "[0.1, 0.2]")
    monkeypatch.setenv("ABLITERATE_EFFICIENCY__ENABLE_SVD_CACHE", "false")
    monkeypatch.setenv("abliterate_evaluation__batch_size", "7")
    loaded = load_settings()
    assert (loaded.model, loaded.search.position, loaded.evaluation.batch_size) == ("demo", (0.1, 0.2), 7)
    assert loaded.efficiency.enable_svd_cache is False


def test_settings_are_frozen() -> None:
    loaded = load_settings()
    for value, name in ((loaded, "seed"), (loaded.search, "trials"), (loaded.efficiency, "enable_svd_cache")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, name, 3)


@pytest.mark.parametrize(
    ("overrides", "wrong", "nearest"),
    [
        ({"search": {"trails": 3}}, "search.trails", "search.trials"),
        ({"sead": 3}, "sead", "seed"),
        ({"efficiency": {"enable_svd_cash": True}}, "efficiency.enable_svd_cash", "efficiency.enable_svd_cache"),
        ({"evaluation": {"batchsize": 3}}, "evaluation.batchsize", "evaluation.batch_size"),
    ],
)
def test_an_unknown_setting_names_the_nearest(overrides: dict[str, Any], wrong: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"There is no setting {re.escape(wrong)}; did you mean {re.escape(nearest)}"):
        load_settings("", overrides)


def test_an_unknown_setting_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"search\.trails.*search\.trials"):
        load_settings(write(tmp_path, "[search]\ntrails = 3\n"))


@pytest.mark.parametrize(
    "name", ["ABLITERATE_SEARCH__TRAILS", "ABLITERATE_SEARCH_TRIALS", "abliterate_sead", "ABLITERATE_SEAD"]
)
def test_a_misspelled_environment_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(InputError, match=f"{name} is not a setting; did you mean ABLITERATE_"):
        load_settings()


def test_an_environment_variable_that_doesnt_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_SEARCH__POSITION", "[0.1")
    with pytest.raises(InputError, match=r"ABLITERATE_ environment variable.*search"):
        load_settings()


def test_other_environment_variables_are_no_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_DEBUG", "1")
    monkeypatch.setenv("OBLITERATE_SEED", "1")
    monkeypatch.setenv("ABLITERATE_SEARCH__MAX_COEFF", '{"default": [0.1, 0.2]}')
    assert load_settings().search.max_coeff["default"] == (0.1, 0.2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("search.trials", -1),
        ("search.trials", "many"),
        ("search.trials", 1.5),
        ("search.distance", 0.0),
        ("search.position", [0.9, 0.1]),
        ("search.position", [-0.1, 0.5]),
        ("search.direction_index", [0.4, 1.1]),
        ("search.min_fraction", [0.0, 2.0]),
        ("search.position", [0.1]),
        ("search.max_coeff", {"attn.o_proj": [0.0, 1.0]}),
        ("search.max_coeff", {"default": [1.0, 0.5]}),
        ("search.select_max_kl", 0),
        ("directions.winsorize_quantile", 0),
        ("directions.winsorize_quantile", 1.01),
        ("edit.rank", 0),
        ("edit.representation", "dense"),
        ("edit.coeff_grid", -0.1),
        ("response.max_new_tokens", 0),
        ("evaluation.batch_size", -1),
        ("evaluation.max_batch_size", 0),
        ("load.quantization", "gptq"),
        ("load.dtypes", []),
        ("load.dtypes", ["float8"]),
        ("efficiency.max_svd_cache_size", 0),
        ("export.max_shard_size", "5G"),
        ("export.max_shard_size", "0GB"),
        ("seed", -1),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    overrides = {section: {leaf: value}} if section else {leaf: value}
    with pytest.raises(InputError, match=name.split(".")[0]) as caught:
        load_settings("", overrides)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_assignments_keep_what_was_given() -> None:
    assert parse_assignments(["search.trials=6", 'search={select="knee"}']) == {"search": {"trials": 6, "select": "knee"}}
    assert parse_assignments(["prompts.suffix= hi "]) == {"prompts": {"suffix": " hi "}}
    assert parse_assignments(["search.trials = 6 ", "edit.mode = pre"]) == {"search": {"trials": 6}, "edit": {"mode": "pre"}}
    dated = parse_assignments(["load.template_options.date=2026-03-31"])
    assert dated == {"load": {"template_options": {"date": "2026-03-31"}}}


def test_an_option_and_an_assignment_may_not_contradict_each_other() -> None:
    given = {"model": "A", "search": {"trials": 100}}
    for assignment, name in (("model=B", "model"), ("search.trials=20", r"search\.trials")):
        with pytest.raises(InputError, match=f"An option and --set {name} give different values"):
            options_of(given, [assignment])
    assert options_of(given, ["search.trials=100", "seed=3"]) == {**given, "seed": 3}


def test_files_that_are_no_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not valid TOML"):
        load_settings(write(tmp_path, "seed = = 1"))
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        load_settings(str(tmp_path / "nowhere.toml"))
    with pytest.raises(InputError, match=r"presets: .*default"):
        load_settings("no-such-preset")


def test_dump_and_load_round_trip(tmp_path: Path) -> None:
    changed = load_settings(
        "",
        {
            "model": 'a"b\\c',
            "search": {"max_coeff": {"default": [0.1, 0.2], "attn.o_proj": [0.0, 3.0]}, "position": [0.25, 0.75]},
            "load": {"max_memory": {"0": "20GiB"}, "dtypes": ["float32"]},
            "response": {"thinking_blocks": [["[a]", "[a][/a]"]]},
            "evaluation": {"scorers": ["kl", "refusals"]},
        },
    )
    assert load_settings(write(tmp_path, dump_settings(changed))) == changed
    assert load_settings(write(tmp_path, dump_settings(load_settings()))) == load_settings()


def test_default_toml_is_the_built_in_defaults() -> None:
    assert load_settings("default").model_dump() == Settings().model_dump()


def test_default_toml_names_every_option_and_nothing_else() -> None:
    assert set(flat(read_toml(config_path("default.toml")))) == set(option_names())


def test_default_toml_explains_every_option() -> None:
    lines = config_path("default.toml").read_text(encoding="utf-8").splitlines()
    section, explained = "", set[str]()
    for before, line in zip(["", *lines], lines, strict=False):
        if header := re.fullmatch(r"\[([\w.]+)\]", line):
            section = header[1] + "."
        elif (option := re.match(r"(\w+) = ", line)) and re.match(r"# \S", before):
            explained.add(section + option[1])
    assert set(option_names()) - explained == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_preset_loads(path: Path) -> None:
    by_name, by_path = load_settings(path.stem), load_settings(str(path))
    assert by_name == by_path
    own, folder = flat(read_toml(path)), f"{path.parent}/"
    loaded = {name: value for name, value in flat(by_name.model_dump(mode="json")).items() if name in own}
    assert {name: value.removeprefix(folder) if isinstance(value, str) else value for name, value in loaded.items()} == own


def test_a_configuration_files_paths_are_those_beside_it_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, here = tmp_path / "own", tmp_path / "here"
    (own / "sets").mkdir(parents=True)
    here.mkdir()
    for place in (
        own / "sets" / "show.txt",
        own / "table.csv",
        own / "length.py",
        own / "arithmetic",
        own / "kl",
        here / "plain.txt",
    ):
        place.write_text("goal\nDo it.\n", encoding="utf-8")
    (here / "table.csv").write_text("another file of that name\n", encoding="utf-8")
    config = write(
        own,
        '[prompts]\nharmful = "sets/show.txt"\nharmless = "plain.txt"\nharmful_eval = "table.csv:goal"\n'
        'harmless_eval = "mlabonne/harmless_alpaca:test[:100]:text"\n[evaluation]\nmarkers = "sets/show.txt"\n'
        '[search]\nobjectives = ["kl", "length.py:Length:maximize"]\n'
        '[directions]\nprotect = ["arithmetic", "sets/show.txt"]\n',
    )
    monkeypatch.chdir(here)
    loaded = load_settings(config)
    show = str(own / "sets" / "show.txt")
    assert (loaded.prompts.harmful, loaded.evaluation.markers) == (show, show)
    assert loaded.prompts.harmless == str(here / "plain.txt")  # not beside it, so it is looked for as on the command line
    assert loaded.prompts.harmful_eval == f"{own}/table.csv:goal"
    assert loaded.prompts.harmless_eval == "mlabonne/harmless_alpaca:test[:100]:text"
    assert loaded.search.objectives == ("kl", f"{own}/length.py:Length:maximize")
    assert loaded.directions.protect == ("arithmetic", show)  # a built-in name isn't a file, as "kl" above
    over = load_settings(config, {"prompts": {"harmful": "table.csv"}})
    assert over.prompts.harmful == str(here / "table.csv")  # the command line's paths are the working directory's


def test_presets_other_than_default_change_something() -> None:
    presets = [path for path in CONFIGS if path.stem != "default"]
    assert presets
    assert all(load_settings(path.stem) != load_settings() for path in presets)


def test_assignments() -> None:
    found = parse_assignments(
        ["search.trials=20", "model=demo", 'prompts.system="a = b"', "search.position=[0.1, 0.2]", "seed = 3"]
    )
    assert found == {
        "search": {"trials": 20, "position": [0.1, 0.2]},
        "model": "demo",
        "prompts": {"system": "a = b"},
        "seed": 3,
    }


@pytest.mark.parametrize("assignments", [["trials"], ["=3"], ["search=1", "search.trials=2"]])
def test_assignments_that_are_none(assignments: list[str]) -> None:
    with pytest.raises(InputError, match="--set"):
        parse_assignments(assignments)


def test_merge() -> None:
    base = {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge(base, {"a": {"y": 5}, "b": {"z": 1}}) == {"a": {"x": 1, "y": 5}, "b": {"z": 1}}
    assert base == {"a": {"x": 1, "y": 2}, "b": 3}


def test_startup_trials() -> None:
    assert SearchSettings().n_startup_trials == 3
    assert SearchSettings(trials=20).n_startup_trials == 6
    assert SearchSettings(trials=10, startup_trials=7).n_startup_trials == 7


def test_reference_turns_every_switch_off_that_an_honest_peer_lacks() -> None:
    reference = EfficiencySettings().reference()
    switches = {name: value for name, value in reference if isinstance(value, bool)}
    assert [name for name, value in switches.items() if value] == ["use_global_warmup"]
    assert len(switches) >= 9
    assert reference.max_svd_cache_size == EfficiencySettings().max_svd_cache_size


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("search.max_coeff={default = [0.8, 1e300]}", "max_coeff.default must lie within ±1e+06"),
        ('search.max_coeff={default = [0.8, 1.0], "mlp.down_proj" = [-1e7, 1.0]}', "max_coeff.mlp.down_proj must lie within"),
        ("search.distance=1e308", "search.distance"),
        ("seed=100000000000000000000000000000", "seed"),
    ],
)
def test_numbers_that_overflow_are_refused(option: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        load_settings("", parse_assignments([option]))


def test_texts_that_read_as_numbers_or_dates_are_texts() -> None:
    given = ["load.template_now=2026-03-31", "load.revision=12345", "evaluation.judge_label='1'", "search.trials=7"]
    settings = load_settings("", parse_assignments(given))
    assert (settings.load.template_now, settings.load.revision) == ("2026-03-31T00:00:00", "12345")
    assert (settings.evaluation.judge_label, settings.search.trials) == ("1", 7)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("refine.betas=4", "The setting refine.betas has a wrong value (4): Input should be 'auto', or a list, such as"),
        ("refine.betas=[0, 1]", "The setting refine.betas.0 has a wrong value (0): Input should be greater than 0"),
        (
            "directions.protect=arithmetic",
            "The setting directions.protect has a wrong value ('arithmetic'): Input should be a list",
        ),
        (
            'load.dtypes=["float8"]',
            "The setting load.dtypes.0 has a wrong value ('float8'): Input should be 'auto', 'float32', ",
        ),
        ("device=[1]", "The setting device has a wrong value ([1]): Input should be a valid string."),
        ("search.trials=x", "The setting search.trials has a wrong value ('x'): Input should be a valid integer"),
    ],
)
def test_a_wrong_value_is_told_with_all_that_is_allowed(given: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings("", parse_assignments([given]))
    assert str(caught.value).startswith(said)
