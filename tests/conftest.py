"""What all tests share: one thread, a private cache, and the runs that several folders look at."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

gc.disable()  # until the tests begin: imports leave little to collect, and every collection looks at more of them

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads beside another busy process become many times slower

# A shell's background job ignores Ctrl+C, and one under nohup a closed terminal, too; processes that tests start would do so.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest

pytest.register_assert_rewrite("support")  # before its first import
# ruff: noqa: E402
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, PretrainedConfig

from abliterate.export.adapter import peft_refusal
from abliterate.model.architectures import Target
from abliterate.model.loader import demo_path
from abliterate.pipeline import preflight
from abliterate.report import draw
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.types import Trial
from support.cli import Invoke
from support.forked import finish, write_config
from support.models import EXPERTS, FAMILIES, NAMED, make_tokenizer
from support.once import made_once
from support.paths import TESTS
from support.postgres import Server, binaries, server
from support.refined import refine_by_hand
from support.runs import DRAW, SECRETS, SMALL, Files, Untouched, copy_run, lean_runs, quick_options, quick_settings, run_in
from support.zoo import NOT_EDITABLE, ZOO

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _objects_so_far_stay() -> None:
    """Full garbage collections, of which a run makes many, needn't look at the modules and fixtures of earlier tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _no_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most tests end their runs with a report without pictures, which take a second each; those of the report draw them."""
    if request.path.parent.name == "report":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "svg", lambda specs: (dict.fromkeys(specs, ""), ""))
        yield


@pytest.fixture
def lean() -> Iterator[None]:
    """Runs write no answers for their report, and their engine checks itself on two rows of two tokens.

    This takes a third of a short run's time. It is for runs whose tests look at neither, as
    `pytest.mark.usefixtures("lean")`; the fixtures of wider scopes are set up before it, with both, unless they do without
    by `lean_runs` themselves.
    """
    with lean_runs():
        yield


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ABLITERATE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        # Gradient steps take longer than the few trials of a test's run; tests of refinement switch it on.
        patch.setenv("ABLITERATE_REFINE__ENABLED", "false")
        # One mode for all families, whatever the default; what edit.mode=auto chooses has tests of its own.
        patch.setenv("ABLITERATE_EDIT__MODE", "full")
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test pulls the plug, and what a killed process has written is there without `fsync`, which takes 8 ms, 80 times a run.

    Tests of full disks replace it by one that fails, so they see that it is called. `support/warm.py` does the same for forks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _adapters_tried_once() -> Iterator[None]:
    """Whether PEFT takes a model's modules is tried once for equal models: each run asks, and the answer takes 0.2 s."""
    answers: dict[tuple[object, ...], str] = {}

    def once(config: PretrainedConfig, load: LoadSettings, targets: Collection[Target], *, dora: bool = True) -> str:
        modules = frozenset((target.name, type(target.module)) for target in targets)
        key = (config.to_json_string(use_diff=False), load.model_dump_json(), modules, dora)
        if key not in answers:
            answers[key] = peft_refusal(config, load, targets, dora=dora)
        return answers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "peft_refusal", once)
        yield


def first_prompts(folder: Path, sources: Mapping[str, tuple[str, int]]) -> Files:
    """Files of the first of the demo's prompts, by name; `sources` has the set and the number of each."""
    files = {}
    for name, (source, count) in sources.items():
        lines = (demo_path() / "prompts" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Few of the demo's prompts: 30 for directions, 12 for scores."""
    sources = {
        "harmful": ("harmful_train", 30),
        "harmless": ("harmless_train", 30),
        "harmful_eval": ("harmful_eval", 12),
        "harmless_eval": ("harmless_eval", 12),
    }
    return made_once(tmp_path_factory, "prompts", lambda folder: first_prompts(folder, sources))


@pytest.fixture(scope="session")
def finished(prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Settings]:
    """A finished run on the demo model: (directory, result, settings). Read only: copy it to change it."""

    def make(folder: Path) -> tuple[Path, dict[str, Any], Settings]:
        settings = quick_settings(prompt_files, folder / "cache")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draw, "svg", DRAW)
            result, _ = run_in(folder / "run", settings)
        return folder / "run", result, settings

    return made_once(tmp_path_factory, "finished", make)


@pytest.fixture(scope="session")
def refined(
    finished: tuple[Path, dict[str, Any], Settings], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Trial, Settings]:
    """The finished run with a refined trial, which is selected: (directory, the trial, settings). Read only."""
    path, _, settings = finished
    run = copy_run(path, tmp_path_factory.mktemp("refined") / "run")
    return run, refine_by_hand(run, settings), settings


@pytest.fixture(scope="session")
def whole(prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A run by the command line that nothing interrupted: (its options as a file, directory, events).

    It knows `SECRETS`, and the folder has all that it wrote, its output included. Read only.
    """

    def make(folder: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
        options = quick_options(prompt_files, folder / "cache", search={"trials": 6}, export={"kind": "adapter"})
        config = write_config(folder / "quick.toml", options)
        command = finish(["--debug", "run", "demo", "-c", config, "-o", "run", "--json"], folder, environment=SECRETS)
        assert command.end() == 0, command.err
        return config, folder / "run", command.events

    return made_once(tmp_path_factory, "whole", make)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    monkeypatch.chdir(tmp_path)  # default run directories and relative paths stay in here
    return Invoke(monkeypatch, capsys)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny classification model of random weights, with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": {0: "compliance", 1: "refusal"}, "label2id": {"compliance": 0, "refusal": 1}}
    config = LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=64, **sizes, **labels
    )
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def heldout_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A few of the demo's held-out prompts."""
    sources = {name: (name, count) for name, count in SMALL.items()}
    return made_once(tmp_path_factory, "heldout", lambda folder: first_prompts(folder, sources))


@pytest.fixture(scope="session")
def measured(
    prompt_files: Files, heldout_files: Files, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Settings]:
    """A finished run with its last step: (directory, result, settings). Read only."""

    def make(folder: Path) -> tuple[Path, dict[str, Any], Settings]:
        over = {"prompts": heldout_files, "evaluation": {"heldout": True}}
        settings = quick_settings(prompt_files, folder / "cache", **over)
        result, recorder = run_in(folder / "run", settings)
        assert not recorder.warnings
        assert recorder.stages.index("held-out") < recorder.stages.index("export")
        return folder / "run", result, settings

    return made_once(tmp_path_factory, "measured", make)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """One server for a file. In CI it must be there."""
    if binaries() is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL isn't installed (apt-get install postgresql)")
    with server() as running:
        yield running


@pytest.fixture(scope="session")
def untouched() -> Untouched:
    """The demo model without this package."""
    return Untouched()


# What `-m smoke` leaves out: whole runs, new processes, and all families but one of each kind (a prefix is shared between,
# at the left, or not; fused experts).
_RUNS = {"prompt_files", "finished", "refined", "whole", "measured", "untouched", "postgres", "terminal", "tab", "large"}
_KINDS = {"llama", "gemma3", "qwen3_5", "qwen3_moe"}
_FAMILIES = {*FAMILIES, *NAMED, *EXPERTS, *ZOO, *NOT_EDITABLE} - _KINDS
_LEFT_OUT = {"cli", "robustness", "runs", "chat", "demo", "scripts", "pipeline", "report", "export", "test_judges.py"}
_PROCESSES = {
    "test_the_pipeline_imports_neither_peft_nor_bitsandbytes_and_both_are_quiet",
    "test_command_line_imports_nothing_heavy",
}


def _is_smoke(item: pytest.Item) -> bool:
    """Whether a test is among those that run after every edit."""
    if item.get_closest_marker("slow") or _RUNS & set(getattr(item, "fixturenames", ())):
        return False
    params = getattr(getattr(item, "callspec", None), "params", {}).values()
    if any(isinstance(value, str) and value in _FAMILIES for value in params):
        return False
    return not _LEFT_OUT & set(item.path.relative_to(TESTS).parts) and item.name not in _PROCESSES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is smoke, and lets the folders whose tests are longest begin."""
    order = ("robustness", "runs", "cli", "unit", "properties", "families")
    items.sort(key=lambda item: order.index(item.path.relative_to(TESTS).parts[0]))
    for item in items:
        if _is_smoke(item):
            item.add_marker("smoke")


def pytest_collection_finish() -> None:
    """The tests begin, and what they leave is to be collected."""
    gc.enable()
