"""A model's bad files end every command with one sentence and exit code 2, before any weights are loaded if possible."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.model.loader import demo_path
from abliterate.pipeline import evaluate as pipeline_evaluate
from support.cli import Invoke, Outcome, assert_sentence, forbidden, prompt_options

COMMANDS = ("run", "inspect", "inspect --no-weights", "evaluate BASE", "evaluate CANDIDATE", "chat")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}', encoding="utf-8"
    )


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()


def config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**raw, **fields}), encoding="utf-8")

    return change


def template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


LOADING = ("run", "inspect", "chat")
# (what is wrong, the commands that must notice it, a part of the sentence)
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "left-over adapter": (adapter, COMMANDS, "merge it first"),
    # An adapter alone is a candidate and can be chatted with.
    "adapter alone": (adapter_alone, COMMANDS[:4], "holds an adapter of owner/base, not a model"),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        tuple(command for command in COMMANDS if command != "inspect --no-weights"),
        "use_safetensors=False",
    ),
    "layers": (config(num_hidden_layers=10), COMMANDS, "num_hidden_layers"),
    "dtype": (config(dtype="bf16"), COMMANDS, "dtype"),
    "wild": (config(num_hidden_layers=10**8), COMMANDS, "no model has more than 2000"),
    "fewer layers": (
        config(num_hidden_layers=6, layer_types=["full_attention"] * 6),
        LOADING,
        "more layers than its config.json",
    ),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        (*LOADING, "inspect --no-weights"),
        "it has none of tokenizer.json",
    ),
    "template": (template("{{ 1 // 0 }}"), ("run", "chat"), "chat template can't render a prompt"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_command_says_what_is_wrong_with_a_model(
    name: str, tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.setattr(pipeline_evaluate, "open_workbench", forbidden)
    change, commands, said = DAMAGE[name]
    folder = Path(shutil.copytree(demo_path() / "model", tmp_path / "m"))
    change(folder)
    for command in commands:
        verb, _, rest = command.partition(" ")
        models = {"BASE": (folder, "demo"), "CANDIDATE": ("demo", folder)}.get(rest, (folder,))
        options = prompt_options(prompt_files) if verb == "run" else []
        begin = time.monotonic()
        outcome = invoke(verb, *models, *options, *([rest] if rest.startswith("--") else []))
        *_, last = outcome.err.splitlines()  # before it, the stages
        assert_sentence(Outcome(outcome.code, outcome.out, last), 2, said)
        assert "unexpected" not in last
        assert time.monotonic() - begin < 20
