"""Whole runs on the demo model with few prompts, and helpers for tests of them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.engine import self_check
from abliterate.errors import Interrupted
from abliterate.model.loader import demo_path
from abliterate.pipeline import report_data
from abliterate.pipeline.run import run
from abliterate.report import draw
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings, merge
from abliterate.types import Trial


def interrupt_after(recorder: Recorder, trials: int) -> Callable[[], None]:
    """A `check` that interrupts during the trial after so many finished trials."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += len(recorder.trials) == trials
        if calls == 2:  # the first is before the trial is asked for
            raise Interrupted

    return check


def with_kind(settings: Settings, kind: str, **over: Any) -> Settings:
    """The same settings with another export."""
    return settings.model_copy(update={"export": settings.export.model_copy(update={"kind": kind, **over})})


def other_trial(result: dict[str, Any]) -> int:
    """A complete trial that the run didn't choose."""
    return next(t["number"] for t in result["trials"] if t["number"] != result["selected"] and t["state"] == "complete")


def read_status(name: str) -> int:
    """A memory figure of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


DRAW = draw.svg


class Recorder:
    """A reporter that keeps what is reported to it."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.trials: list[Trial] = []
        self.totals: list[int] = []  # that were reported with each trial
        self.units: set[tuple[str, str]] = set()  # (stage, unit) of what progress was shown for
        self.result: Mapping[str, Any] | None = None

    def header(self, fields: Mapping[str, str]) -> None: ...
    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self.stages.append(name)

    def stage_ended(self) -> None: ...
    def progress(self, done: int, total: int, unit: str) -> None:
        assert done <= total
        self.units.add((self.stages[-1] if self.stages else "", unit))

    def note(self, text: str, **fields: Any) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        self.trials.append(trial)
        self.totals.append(total)

    def finish(self, result: Mapping[str, Any], *rest: Any) -> None:
        self.result = result

    def close(self) -> None: ...


def quick_options(prompt_files: Mapping[str, str], cache: Path, **over: Any) -> dict[str, Any]:
    """Options of a run that takes seconds: few prompts, few short trials, and a space in which edits surely have an effect."""
    options = {
        "model": "demo",
        "cache_dir": str(cache),
        "prompts": dict(prompt_files),
        "response": {"max_new_tokens": 20, "prefix_prompts": 4},
        "search": {
            "trials": 4,
            "startup_trials": 2,
            "ei_candidates": 8,
            "max_coeff": {"default": [1.2, 1.5]},
            "position": [0.3, 0.6],
            "direction_index": [0.4, 0.7],
        },
        "evaluation": {"batch_size": 12, "heldout": False},
        "refine": {"enabled": False},
    }
    return merge(options, over)


def quick_settings(prompt_files: Mapping[str, str], cache: Path, **over: Any) -> Settings:
    """`quick_options` as settings."""
    return load_settings("", quick_options(prompt_files, cache, **over))


def run_in(path: Path, settings: Settings, *, resume: bool = False, **options: Any) -> tuple[dict[str, Any], Recorder]:
    """Run once in a directory, and return the content of `result.json` and the recorder of its reports."""
    recorder = Recorder()
    return run(settings, recorder, RunDirectory(path), resume=resume, **options).to_record(), recorder


@contextlib.contextmanager
def lean_runs() -> Iterator[None]:
    """Runs in this block write no answers for their report, and their engine checks itself on two rows of two tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_data, "answers", lambda bench, trial: None)
        patch.setattr(self_check, "ROWS", 2)
        patch.setattr(self_check, "TOKENS", 2)
        yield


def outcomes(result: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The parts of trials that must be equal between runs: everything but the seconds."""
    return [(t["number"], t["params"], t["state"], t["scores"]) for t in result["trials"]]


def copy_run(source: Path, to: Path) -> Path:
    """A copy of a run directory that a test may change."""
    shutil.copytree(source, to)
    return to


Files = dict[str, str]
SMALL = {"harmful_heldout": 8, "harmless_heldout": 8, "over_refusal": 6}
# In the environment of runs that must not write them down.
SECRETS = {
    "HF_TOKEN": "hf_aSecretOfTheHubThatNobodyMaySee",
    "HUGGING_FACE_HUB_TOKEN": "hf_anOlderNameOfTheSameSecretThing",
    "OPENAI_API_KEY": "sk-proj-aSecretOfAnotherCompany123",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIsecretsecretsecretKEY",
}


class Untouched:
    """The demo model as `transformers` alone loads it; every measurement of the base model must agree with it."""

    def __init__(self) -> None:
        folder = demo_path() / "model"
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._generated: dict[tuple[Any, ...], list[list[int]]] = {}

    def ids(self, prompt: str, system: str, prefix: str = "") -> list[int]:
        """The ids that the model reads: the template's text and the response prefix."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text + prefix, add_special_tokens=False)["input_ids"]

    def generate(self, prompts: Sequence[str], settings: Settings, prefix: str = "") -> list[list[int]]:
        """The ids of the greedy answers, padded after each answer's end."""
        system, length = settings.prompts.system, settings.response.max_new_tokens
        key = (tuple(prompts), system, prefix, length)
        if key not in self._generated:
            batch = self.tokenizer.pad(
                {"input_ids": [self.ids(prompt, system, prefix) for prompt in prompts]}, return_tensors="pt"
            )
            found = self.model.generate(**batch, do_sample=False, max_new_tokens=length)
            self._generated[key] = found[:, batch["input_ids"].shape[1] :].tolist()
        return self._generated[key]

    def answers(self, prompts: Sequence[str], settings: Settings, prefix: str = "") -> list[str]:
        """The texts of the greedy answers."""
        rows = self.generate(prompts, settings, prefix)
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
