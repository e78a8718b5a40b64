"""The command line: exit codes, one sentence per error, JSON lines, Ctrl+C, the cache commands."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import run as cli_run
from abliterate.cli.exit import quiet_libraries
from abliterate.files import digest_of, write_json
from abliterate.model import loader
from abliterate.model.loader import demo_path
from abliterate.settings.sources import config_path
from support.cli import (
    QUICK,
    Finished,
    Invoke,
    Outcome,
    assert_json_lines,
    assert_sentence,
    filled_cache,
    forbidden,
    prompt_options,
    spawn,
)
from support.events import let_models_print
from support.forked import Command, Lean, OfHub, finish
from support.gguf_files import types_of, write_gguf
from support.models import make_model, save_model
from support.runs import copy_run

pytestmark = pytest.mark.usefixtures("lean")


def test_help_is_quick(tmp_path: Path) -> None:
    """By the processor's time, because other tests run beside it."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = spawn(["--help"], tmp_path)
        out, _ = process.communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert process.returncode == 0
        assert "run" in out
    assert 0.01 < min(times) < 0.8


@pytest.mark.parametrize("command", ["run", "tune-batch", "trials", "export", "reproduce", "evaluate", "report", "cache"])
def test_every_command_has_help(invoke: Invoke, command: str) -> None:
    outcome = invoke(command, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out


def test_version(invoke: Invoke) -> None:
    from abliterate import __version__

    assert __version__ in invoke("--version").out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "/no/such/model"], "/no/such/model"),
        (["run"], "abliterate run demo"),
        (["run", "demo", "--set", "search.trails=5"], "search.trials"),
        (["run", "demo", "-n", "0"], "trials"),
        (["run", "demo", "--set", "directions.winsorize_quantile=2"], "winsorize_quantile"),
        (["run", "demo", "--set", "nonsense"], "key=value"),
        (["run", "demo", "-c", "no-such-preset"], "presets"),
        (["run", "demo", "--resume", "--restart"], "contradict"),
        (["run", "demo", "--device", "warp:3"], "device"),
        (["run", "demo", "--harmful", "no/such/file.txt"], "no/such/file.txt"),
        (["run", "demo", "--markers", "nowhere.txt"], "nowhere.txt"),
        (["run", "demo", "--select", "best"], "best"),
        (["run", "demo", "--set", "edit.mode=fulll"], "'fulll'"),
        (["run", "demo", "--set", "directions.method=projectd"], "'projectd'"),
        (["run", "demo", "--set", 'evaluation.scorers=["refusals", "kl", "tone"]'], "'tone'"),
        (["run", "demo", "--set", 'evaluation.scorers=["beauty"]'], "no scorer 'beauty'"),
        (["run", "demo", "--set", 'search.max_coeff={default=[0, 1], "mlp.down_prj"=[0, 1]}'], "did you mean mlp.down_proj?"),
        (["run", "demo", "-n", "5", "--set", "search.trials=6"], "search.trials give different values"),
        (["run", "demo", "--no-open"], "belongs to --live"),
        (
            ["run", "demo", "--set", "directions.method=biprojected", "--set", 'directions.protect=["code"]'],
            "which undoes that; leave directions.protect out",
        ),
        (["evaluate", "demo", "demo", "--benchmark-limit", "5"], "belong to --benchmark NAME"),
        (["trials", "nowhere"], "no run"),
        (["export", "nowhere", "--trial", "1"], "no run"),
        (["export", "nowhere", "--trial", "1", "--push", "name"], "no run"),
        (["report", "nowhere"], "no run"),
    ],
)
def test_bad_input_is_one_sentence(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loader, "load_model", forbidden)  # found before a model is loaded
        assert_sentence(invoke(*arguments), 2, part)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "runs"])  # nothing is left of a run that never began
    assert not list(tmp_path.glob("runs/*"))


def test_unknown_environment_name_is_bad_input(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_SEARCH__TRAILS", "5")
    assert_sentence(invoke("run", "demo"), 2, "ABLITERATE_SEARCH__TRIALS")


def test_bad_jsonl_line_is_named_by_number(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n', encoding="utf-8")
    assert_sentence(invoke("run", "demo", "--harmful", path), 2, "Line 3", "prompts.jsonl")


def test_empty_prompt_file_is_bad_input(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n", encoding="utf-8")
    assert_sentence(invoke("run", "demo", "--harmless", path), 2, "holds no prompts")


def test_model_without_matrix_is_bad_input(invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    folder = save_model(make_model("llama"), tmp_path / "m")
    outcome = invoke(
        *("run", folder, *prompt_options(prompt_files), "--set", "load.decoder_layers=model.layers"),
        *("--set", 'load.components={"attn.o_proj" = "nothing.here"}'),
    )
    assert_sentence(outcome, 2, "no matrix to edit")


def test_directory_of_another_run_is_refused(invoke: Invoke, finished: Finished) -> None:
    path, _, _ = finished
    before = (path / "result.json").read_bytes()
    assert_sentence(invoke("run", "demo", "-o", path), 2, "--resume", "--restart")
    assert (path / "result.json").read_bytes() == before


def test_directory_of_something_else_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…", encoding="utf-8")
    assert_sentence(invoke("run", "demo", "-o", "mine"), 2, "not empty")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "mistake", [("--harmful", "no/such.txt"), ("--set", "edit.mode=fulll"), ("--dtype", "float16x"), ("-c", "no-preset")]
)
def test_restart_with_a_mistake_leaves_the_old_run(
    invoke: Invoke, finished: Finished, tmp_path: Path, mistake: tuple[str, str]
) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    assert_sentence(invoke("run", "demo", "-o", run, "--restart", *mistake), 2)
    assert_sentence(invoke("run", "/no/model", "-o", run, "--restart"), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (run / "result.json").read_bytes() == (finished[0] / "result.json").read_bytes()


def test_unexpected_error_is_one_sentence(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> str:
        raise RuntimeError("a bug\nof two lines")

    monkeypatch.setattr(loader, "resolve_source", broken)
    outcome = invoke("run", "demo")
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "RuntimeError: a bug" in " ".join(outcome.err.split())


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("DefaultCPUAllocator: 8 bytes.\nStack")])
def test_too_little_memory_is_one_sentence(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(name: str) -> str:
        raise error

    monkeypatch.setattr(loader, "resolve_source", full)
    assert_sentence(invoke("run", "demo"), 1, "too little memory")


def test_a_model_larger_than_memory_is_not_begun(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end with a killed process and no message; the demo takes 7.6 MB, in bfloat16 half."""
    monkeypatch.setattr("abliterate.model.checkpoint.free_memory", lambda device: 1 << 20)
    assert_sentence(invoke("run", "demo"), 1, "GiB of main memory")


def test_advice_about_the_disk_is_true_of_every_command(invoke: Invoke, tmp_path: Path) -> None:
    store = filled_cache(tmp_path / "c")
    in_the_way = tmp_path / "c" / "residuals" / f"{'a' * 64}.{'b' * 32}.abliterate-tmp"
    in_the_way.mkdir()  # can't be unlinked
    os.utime(in_the_way, (0, 0))
    outcome = invoke("cache", "clear", "--yes", "--cache-dir", store.root)
    assert_sentence(outcome, 1, "abliterate-tmp", "repeat the command", "a run keeps its finished trials")


def test_hub_id_without_network_ends_soon(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    """After one failed request no other is made: the Hub's own retries take 23 s."""
    attempts: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as nobody:

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    attempts.append(nobody.accept()[0].close())

        threading.Thread(target=hang_up, daemon=True).start()
        arguments = ["run", "nobody/no-model", *prompt_options(prompt_files)]
        command = finish(arguments, tmp_path, before=OfHub(nobody.getsockname()[1], str(tmp_path / "hf")))
    assert_sentence(Outcome(command.end(), command.out, command.err), 2, "nobody/no-model", "local directory")
    assert 1 <= len(attempts) <= 2
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_trials_and_report_of_a_run(invoke: Invoke, finished: Finished, tmp_path: Path) -> None:
    path, result, _ = finished
    run = copy_run(path, tmp_path / "run")
    shown = json.loads(invoke("trials", run, "--json").out)
    assert (shown["front"], shown["selected"]) == (result["front"], result["selected"])
    assert f"All {len(result['trials'])} trials" in invoke("trials", run).out
    (run / "report.html").unlink()
    assert invoke("report", run).code == 0
    assert (run / "report.html").is_file()


def test_export_of_an_unknown_trial_is_refused(invoke: Invoke, finished: Finished) -> None:
    assert_sentence(invoke("export", finished[0], "--trial", "99"), 2, "no finished trial 99")


def test_export_never_replaces_what_is_not_ours(invoke: Invoke, finished: Finished, tmp_path: Path) -> None:
    run, trial = copy_run(finished[0], tmp_path / "run"), finished[1]["front"][0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…", encoding="utf-8")
    for out, part in ((tmp_path / "mine", "no export"), (run, "no export"), (run / "model", "--select trial")):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert_sentence(invoke("export", run, "--trial", trial, "-o", out), 2, part)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_export_of_any_trial(invoke: Invoke, finished: Finished, tmp_path: Path) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    outcome = invoke("export", run, "--trial", finished[1]["front"][0], "--kind", "adapter", "-o", tmp_path / "ad", "--json")
    assert outcome.code == 0, outcome
    last = assert_json_lines(outcome.out)[-1]
    assert last["result"]["export"]["verified"] is True
    assert (tmp_path / "ad" / "adapter_model.safetensors").is_file()


def test_export_of_a_gguf_file(invoke: Invoke, finished: Finished, tmp_path: Path) -> None:
    run, number = finished[0], finished[1]["front"][0]
    model = AutoModelForCausalLM.from_pretrained(demo_path() / "model", dtype=torch.float32)
    base, out = write_gguf(model, tmp_path / "base.gguf", "F16"), tmp_path / "new" / "out.gguf"
    export = ("export", run, "--trial", number)
    with pytest.MonkeyPatch.context() as patch:
        let_models_print(patch)
        outcome = invoke(*export, "--gguf", base, "--gguf-type", "q8_0", "-o", out, "--json")
    assert outcome.code == 0, outcome
    events = assert_json_lines(outcome.out)
    assert any(event["event"] == "note" and event["fields"].get("type") == "Q8_0" for event in events)
    record = events[-1]["result"]["export"]
    assert (record["kind"], record["path"], record["verified"]) == ("gguf", "out.gguf", True)
    assert record["tensor_types"] == [{"base": "F16", "export": "Q8_0"}]
    types = types_of(out)
    edited = {name for name, kind in types.items() if kind == "Q8_0"}
    assert len(edited) == record["edited_modules"] > 0
    assert all(name.endswith(("attn_output.weight", "ffn_down.weight")) for name in edited)
    assert types["blk.1.ffn_up.weight"] == "F16"
    for further, part in (
        (["--gguf", base, "-o", out], "exists and is not replaced"),
        (["--gguf", base, "-o", tmp_path / "b.gguf", "--gguf-type", "Q4_K"], "can't write tensors as Q4_K; choose --gguf-type"),
        (["--gguf", base, "--kind", "adapter"], "either --kind adapter or made from --gguf"),
        (["--gguf", base, "--verify"], "leave --verify out"),
        (["--gguf", base, "--push", "me/name"], "run hf upload me/name"),
        (["--gguf-type", "F16"], "only used with --gguf FILE"),
        (["--gguf", tmp_path / "nowhere.gguf"], "There is no file"),
        (["--gguf", demo_path() / "model" / "config.json"], "it doesn't begin as such a file does"),
    ):
        assert_sentence(invoke(*export, *further), 2, part)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["base.gguf", "new", "out.gguf"]


def states_of(events: Sequence[dict[str, Any]]) -> list[str]:
    """States of the trials that have been told."""
    return [event["trial"]["state"] for event in events if event["event"] == "trial"]


@pytest.mark.slow
def test_export_while_the_run_goes_on(invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    options = [*prompt_options(prompt_files), *QUICK, "--export", "none", "-o", tmp_path / "run"]
    command = Command(["run", "demo", *options, "-n", "4000", "--json"], tmp_path)
    # Then both are in result.json, and one of them isn't on the front.
    assert command.wait_for(lambda events: {"complete", "stopped"} <= {*states_of(events)[:-1]})
    states = states_of(command.events)
    number = states.index("complete")
    outcome = invoke("export", tmp_path / "run", "--trial", number, "-o", tmp_path / "out", "--json")
    shown = json.loads(invoke("trials", tmp_path / "run", "--front", "--json").out)
    assert shown["selected"] is None
    assert 0 < len(shown["trials"]) == len(shown["front"]) < shown["finished"]
    assert command.process.is_alive(), "it goes on"
    command.send(signal.SIGINT)
    command.end()
    assert outcome.code == 0, outcome
    assert assert_json_lines(outcome.out)[-1]["result"]["export"]["verified"] is True
    kept = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert len(kept["trials"]) >= len(states_of(command.events)) >= len(states)
    assert kept["export"]["path"] is None


def test_export_is_of_the_runs_edit_whatever_the_environment_says(
    invoke: Invoke, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = finished[1]["front"][0]
    made = []
    for name, value in (
        ("ABLITERATE_EDIT__MODE", "none"),
        ("ABLITERATE_EDIT__COEFF_GRID", "0.5"),
        ("ABLITERATE_PROMPTS__SUFFIX", "x"),
    ):
        monkeypatch.setenv(name, value)
        out = tmp_path / name
        assert invoke("export", finished[0], "--trial", number, "-o", out).code == 0
        card = (out / "README.md").read_text(encoding="utf-8")
        made.append(((out / "model.safetensors").read_bytes(), card[card.index("## How to reproduce") :]))
    assert all(one == made[0] for one in made)


def test_interrupted_run_is_kept_and_resumed(invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    options = [*prompt_options(prompt_files), *QUICK, "--export", "none", "-o", tmp_path / "run"]
    command = Command(["run", "demo", *options, "-n", "400", "--json"], tmp_path)
    assert command.wait_for(lambda events: len(states_of(events)) >= 2)
    command.send(signal.SIGINT)
    code, last = command.end(), command.events[-1]
    assert (last["event"], last["exit_code"]) == ("error", 130)
    assert_sentence(Outcome(code, "", command.err), 130, "--resume")
    kept = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert len(kept["trials"]) >= 2
    resumed = finish(["run", "demo", *options, "-n", len(kept["trials"]) + 1, "--resume", "--json"], tmp_path, before=Lean())
    assert (resumed.end(), "Traceback" in resumed.err) == (0, False), resumed.err
    events = assert_json_lines(resumed.out)  # of a process of its own, nothing else is on its output
    assert events[-1]["event"] == "result"
    result = events[-1]["result"]
    assert result == json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert sum(event["event"] == "trial" for event in events) == 1
    assert result["trials"][:-1] == kept["trials"]


def counts(unanswered: int) -> dict[str, Any]:
    """Records of trials that refuse nothing and leave prompts unanswered."""
    return {"refusals": 0, "unanswered": {"count": unanswered}}


def test_advice_after_an_interruption_is_the_rules_choice(finished: Finished, tmp_path: Path) -> None:
    path, result, settings = finished
    directory = RunDirectory(copy_run(path, tmp_path / "run"))
    template = result["trials"][result["front"][0]]
    trials = [
        {**template, "number": number, "scores": {**counts(unanswered), "kl": {"mean": kl, "median": kl, "max": kl}}}
        for number, (kl, unanswered) in enumerate([(0.01, 9), (0.05, 2), (0.9, 0)])
    ]
    changed = {**result, "trials": trials, "front": [0, 1, 2], "selected": None}
    write_json(directory.result, changed | {"sha256": digest_of(changed)})
    assert "--trial 1." in cli_run._how_to_continue(directory, settings)
    rule = settings.model_copy(update={"search": settings.search.model_copy(update={"select": "kl<=0.001"})})
    assert "--trial" not in cli_run._how_to_continue(directory, rule)
    directory.result.write_text("{", encoding="utf-8")  # damaged: how to go on is said all the same
    assert cli_run._how_to_continue(directory, settings).endswith(
        f"--resume --out {directory.path} --cache-dir {settings.cache_dir}."
    )


def test_resume_on_nothing_starts(invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    options = [*prompt_options(prompt_files), *QUICK, "--export", "none", "-n", "1", "-o", tmp_path / "new"]
    assert invoke("run", "demo", *options, "--resume").code == 0
    kept = (tmp_path / "new" / "result.json").read_bytes()
    assert invoke("run", "demo", *options, "--restart").code == 0  # the old one is kept under another name
    assert (tmp_path / "new.old-1" / "result.json").read_bytes() == kept


def test_run_with_relative_paths_goes_on_from_anywhere(
    invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(demo_path() / "model", tmp_path / "base")
    (tmp_path / "markers.txt").write_text(config_path("markers.txt").read_text(encoding="utf-8"), encoding="utf-8")
    for name, path in prompt_files.items():
        shutil.copyfile(path, tmp_path / f"{name}.jsonl")
    names = prompt_options({name: f"{name}.jsonl" for name in prompt_files})
    assert invoke("run", "base", *names, *QUICK, "--markers", "markers.txt", "-n", "2", "-o", "run").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # --out as the environment gives it, and a file that says one thing only: the rest is the run's own.
    (tmp_path / "own.toml").write_text("[search]\ntrials = 3\n", encoding="utf-8")
    monkeypatch.setenv("ABLITERATE_OUT", "../run")
    resumed = invoke("run", "--resume", "-c", "../own.toml", "--json")
    assert resumed.code == 0, resumed
    result = assert_json_lines(resumed.out)[-1]["result"]
    assert len(result["trials"]) == 3
    assert invoke("export", "../run", "--trial", result["selected"], "--kind", "adapter").code == 0
    shared = [tmp_path / "run" / name for name in ("result.json", "report.html")]
    shared += [path for path in tmp_path.glob("run/model*/*") if path.suffix != ".safetensors"]
    assert len(shared) > 8
    assert not [path for path in shared if str(tmp_path) in path.read_text(encoding="utf-8")]  # no private path


def test_restart_with_a_database_begins_anew(invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    options = [*prompt_options(prompt_files), *QUICK, "--export", "none", "--storage", url, "-o", tmp_path / "run"]

    def numbers(*more: object) -> list[int]:
        outcome = invoke("run", "demo", *options, *more, "--json")
        assert outcome.code == 0, outcome
        events = assert_json_lines(outcome.out)
        return [event["trial"]["number"] for event in events if event["event"] == "trial"]

    assert numbers("-n", "1") == [0]
    assert numbers("-n", "2", "--resume") == [1]
    assert numbers("-n", "1", "--restart", "--seed", "1") == [0]


def test_tune_batch_as_json(invoke: Invoke) -> None:
    last = assert_json_lines(invoke("tune-batch", "demo", "--set", "evaluation.max_batch_size=4", "--json").out)[-1]
    assert list(last["operations"]) == ["residuals", "prefill", "decode"]
    for one in last["operations"].values():
        assert 1 <= one["size"] <= 4
        assert one["row_bytes"] > 0
        assert any(probe["size"] == one["size"] and probe["tokens_per_second"] > 0 for probe in one["probes"])


def test_cache_path_and_empty_cache(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("cache", "path", "--cache-dir", tmp_path / "c").out.strip() == str(tmp_path / "c")
    assert invoke("cache", "path").out.strip() == os.environ["ABLITERATE_CACHE_DIR"]
    assert json.loads(invoke("cache", "ls", "--cache-dir", tmp_path / "c", "--json").out)["entries"] == []
    assert invoke("cache", "clear", "--cache-dir", tmp_path / "c").code == 0


def test_cache_ls_says_what_entries_are_of(invoke: Invoke, tmp_path: Path) -> None:
    filled_cache(tmp_path / "c")
    entries = json.loads(invoke("cache", "ls", "--cache-dir", tmp_path / "c", "--json").out)["entries"]
    assert {entry["of"] for entry in entries} == {"one: 3 prompts", "two: 3 prompts"}
    assert "2 entries" in invoke("cache", "ls", "--cache-dir", tmp_path / "c").out


def test_cache_clear_asks_for_yes_without_a_terminal(invoke: Invoke, tmp_path: Path) -> None:
    store = filled_cache(tmp_path / "c")
    assert_sentence(invoke("cache", "clear", "--cache-dir", tmp_path / "c"), 2, "--yes")
    assert len(list(store.entries())) == 2


def test_cache_clear_filters_and_spares_strangers(invoke: Invoke, tmp_path: Path) -> None:
    store = filled_cache(tmp_path / "c")
    place = ("--cache-dir", tmp_path / "c", "--yes")
    assert "nothing" in invoke("cache", "clear", "--older-than", "1", *place).out
    assert "deleted 1 entries" in invoke("cache", "clear", "--model", "one", *place).out
    assert [entry.key["model"] for entry in store.entries()] == ["two"]
    assert invoke("cache", "clear", *place).code == 0
    assert [path.name for path in (tmp_path / "c").rglob("*") if path.is_file()] == ["notes.txt"]


def test_cache_clear_finds_what_no_entry_claims(invoke: Invoke, tmp_path: Path) -> None:
    store = filled_cache(tmp_path / "c")
    for entry in store.entries():
        entry.sidecar.unlink()
    stale = tmp_path / "c" / "residuals" / f"{'a' * 64}.{'b' * 32}.abliterate-tmp"
    stale.write_bytes(b"half")
    os.utime(stale, (0, 0))
    outcome = invoke("cache", "clear", "--yes", "--cache-dir", tmp_path / "c")
    assert "3 unusable files" in outcome.out
    assert [path.name for path in (tmp_path / "c").rglob("*") if path.is_file()] == ["notes.txt"]


@pytest.mark.parametrize("age", ["-1", "-1d", "x", "1y", "nan", "inf", "12 hours", "--", "1e3"])
def test_an_age_that_is_none_deletes_nothing(age: str, invoke: Invoke, tmp_path: Path) -> None:
    store = filled_cache(tmp_path / "c")
    outcome = invoke("cache", "clear", "--yes", "--cache-dir", tmp_path / "c", f"--older-than={age}")
    assert_sentence(outcome, 2, "--older-than needs an age from 0 up, like 12h, 7d or 30 (days)", age)
    assert len(list(store.entries())) == 2


@pytest.mark.parametrize(
    ("age", "deleted"),
    [
        *(("8d", set()), ("1w", set()), ("1.5", set()), ("1d", {"damaged"}), ("24h", {"damaged"}), ("1", {"damaged"})),
        *(("12h", {"damaged", "one"}), ("0.5", {"damaged", "one"}), ("30 min", {"damaged", "one"})),
        *(("29m", {"damaged", "one", "two"}), ("0", {"damaged", "one", "two"}), ("", {"damaged", "one", "two"})),
    ],
)
def test_ages_of_entries(age: str, deleted: set[str], invoke: Invoke, tmp_path: Path) -> None:
    """An entry of 12 hours, another of 29 minutes, and a damaged one of 24 hours, which counts as all of it does."""
    store, now, paths = filled_cache(tmp_path / "c"), time.time(), {}
    for entry in store.entries():
        name = str(entry.key["model"])
        paths[name] = entry.sidecar
        record = json.loads(entry.sidecar.read_text(encoding="utf-8"))
        record["created"] = now - (12 * 3600 if name == "one" else 29 * 60)
        entry.sidecar.write_text(json.dumps(record), encoding="utf-8")
    paths["damaged"] = tmp_path / "c" / "residuals" / f"{'d' * 64}.json"
    paths["damaged"].write_bytes(b"")
    os.utime(paths["damaged"], (now - 86400, now - 86400))
    assert invoke("cache", "clear", "--yes", "--cache-dir", tmp_path / "c", "--older-than", age).code == 0
    assert {name for name, path in paths.items() if not path.exists()} == deleted


def test_cache_clear_by_path(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ("--cache-dir", tmp_path / "c", "--yes")
    (tmp_path / "models" / "one").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    for path in (tmp_path / "models" / "one", f"{tmp_path}/models/one/", "~/one", "models/one", "./gone/one", "one"):
        store = filled_cache(tmp_path / "c")
        assert "deleted 1 entries" in invoke("cache", "clear", "--model", path, *place).out, path
        assert [entry.key["model"] for entry in store.entries()] == ["two"]
    assert "nothing" in invoke("cache", "clear", "--model", "owner/one", *place).out


def test_cache_verify_finds_damage(invoke: Invoke, tmp_path: Path) -> None:
    store = filled_cache(tmp_path / "c")
    assert invoke("cache", "verify", "--cache-dir", tmp_path / "c").code == 0
    damaged = next(iter(store.entries())).data
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    outcome = invoke("cache", "verify", "--cache-dir", tmp_path / "c")
    assert_sentence(outcome, 1, "1 cache entries", "abliterate cache clear deletes them with all others")
    assert "checksum" in outcome.out
    assert "deleted 2 entries" in invoke("cache", "clear", "--yes", "--cache-dir", tmp_path / "c").out
    assert invoke("cache", "verify", "--cache-dir", tmp_path / "c").out == "0 entries are sound\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_measurement_says_so(number: signal.Signals, tmp_path: Path) -> None:
    command = Command(["tune-batch", "demo", "--cache-dir", "c"], tmp_path)
    while "measure batch sizes" not in command.out:
        assert command.process.is_alive(), command.err
        time.sleep(0.01)
    command.send(number)
    assert command.end() == 128 + number
    assert "interrupted" in command.err
    assert "Traceback" not in command.err


def test_errors_are_said_where_no_memory_is_left(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(message: str) -> None:
        raise MemoryError

    monkeypatch.setattr("abliterate.terminal.reporters.show_error", full)
    assert_sentence(invoke("run", "/no/model"), 2, "/no/model")


def test_what_libraries_will_change_is_not_told_to_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.warnoptions", [])
    for debug, told in (("", 0), ("1", 1)):
        monkeypatch.setenv("ABLITERATE_DEBUG", debug)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            quiet_libraries()
            warnings.warn("`past_key_values` is deprecated", FutureWarning, stacklevel=1)
        assert len(seen) == told


def test_a_run_that_is_not_there_cannot_be_continued(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert_sentence(invoke("run", "--resume", "-o", "runs/mien"), 2, "runs/mien")


def test_trials_of_another_run_need_trials(finished: Finished, invoke: Invoke) -> None:
    assert_sentence(invoke("run", "demo", "-n", "0", "--seed-from", finished[0]), 2, "give some with -n")
