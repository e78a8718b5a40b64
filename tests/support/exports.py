"""Export jobs of tiny models, checkpoints with peculiarities, and a case for the check without prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from abliterate.artifacts.result import ModelRecord, Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.edits import METHODS, Factors
from abliterate.export import EXPORTERS, ExportJob
from abliterate.export.base_weights import Matrices
from abliterate.export.check_weights import CHUNK, ROUNDING, by_definition, by_factors, check_weights
from abliterate.export.safetensors_copy import read_header, shard_files
from abliterate.model import loader
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel
from abliterate.objectives import DEFAULT
from abliterate.pipeline import stages
from abliterate.pipeline.cache_keys import TOKENIZER_PART, tokenizer_identity
from abliterate.settings.schema import ExportSettings, LoadSettings, Settings
from abliterate.settings.sources import load_settings
from abliterate.types import Baseline, Kernel, Trial, TrialParams
from support.models import make_directions, make_editor, make_loaded, make_model, make_params, save_model

MODES = ("full", "pre", "none", "columns")
ON = TrialParams("global", 1.0, dict.fromkeys(("attn.o_proj", "mlp.down_proj"), Kernel(1.0, 1.0, 1.0, 9.0)))


# The facts of a model card, without what it says of the check.
CARD_FACTS: dict[str, Any] = {
    "base": "owner/name",
    "on_hub": True,
    "recipe": "the recipe",
    "revision": "abc",
    "n_harmful": 100,
    "n_harmless": 90,
    "before": 97,
    "after": 12,
    "kl": {"mean": 0.0512, "median": 0.0301, "max": 0.4},
    "mode": "full",
    "representation": "exact",
    "approximation": {},
    "method": "projected",
    "number": 7,
    "seed": 3,
    "params": make_params(0),
    "objectives": DEFAULT,
    "before_values": {},
    "values": {},
}


@dataclass(frozen=True)
class Case:
    """A trial on a saved model: its export job, and the definitions of its edits."""

    job: ExportJob
    editor: Editor
    params: TrialParams
    mode: str

    def check(
        self, kind: str, folder: Path, job: ExportJob | None = None, *, chunk: int = CHUNK, rounding: float = ROUNDING
    ) -> tuple[bool, dict[str, Any]]:
        """Export `job` (by default the trial's own job), and check the exported files."""
        if not folder.exists():
            write(kind, job or self.job, folder)
        base = Matrices(self.job.source, self.job.load, self.job.architecture)
        definitions = {
            name: by_definition(METHODS[self.mode], *self.editor.vectors(self.params, key), chunk=chunk)
            if self.editor._settings.representation == "exact"
            else by_factors(self.job.factors[name])
            for name, key in self.editor.plan(self.params).items()
        }
        reread = EXPORTERS[kind].reread(folder, self.job, base)
        verdict = check_weights(base, reread, definitions, lambda done, total: None, chunk=chunk, rounding=rounding)
        return verdict.ok, verdict.record

    def with_factors(self, change: Callable[[dict[str, Factors]], dict[str, Factors]]) -> ExportJob:
        """The job with other factors than the trial's."""
        return replace(self.job, factors=change(dict(self.job.factors)))


def make_case(folder: Path, family: str = "llama", stored: str = "bfloat16", seed: int = 0, **settings: Any) -> Case:
    """A case on a tiny model; one row of an edited matrix is zero. `settings` are those of `make_editor`."""
    model = make_model(family)
    model = zero_row(model) if family == "llama" else model
    path = save_model(model.to(getattr(torch, stored)), folder / "base")
    loaded = make_loaded(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), str(path))
    editor, params = make_editor(loaded, **settings), make_params(seed)
    return Case(make_job(loaded, editor.factors(params)), editor, params, settings.get("mode", "full"))


def raw(folder: Path) -> dict[str, bytes]:
    """{tensor: bytes} of all files."""
    found = {}
    for path in shard_files(folder):
        data = path.read_bytes()
        found |= {name: data[stored.start : stored.end] for name, stored in read_header(path).items()}
    return found


FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def zero_row(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a zero row in one edited matrix."""
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5].zero_()
    return model


def make_job(loaded: LoadedModel, factors: Mapping[str, Factors]) -> ExportJob:
    """A job as the pipeline makes it."""
    return ExportJob(
        loaded.info.source,
        "sha256:0",
        LoadSettings(),
        ExportSettings(),
        loaded.architecture,
        loaded.tokenizer,
        factors,
        "tiny",
        "the card",
    )


def write(kind: str, job: ExportJob, folder: Path) -> Mapping[str, Any]:
    """Export into a folder."""
    folder.mkdir()
    return EXPORTERS[kind].write(job, folder)


def renamed_checkpoint(folder: Path) -> None:
    """A checkpoint saved without the head's prefix, which `transformers` adds while loading; the Hub has such files."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def odd_checkpoint(folder: Path) -> None:
    """The same numbers in another dtype than the config's; such files aren't edited in place."""
    tensors = load_file(folder / "model.safetensors")
    odd = {name: tensor.double() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    save_file(odd, folder / "model.safetensors", {"format": "pt"})


def make_run(folder: Path, base: Path, count: int = 1, **options: Any) -> tuple[Settings, RunDirectory]:
    """A run of one trial on a local model, with `count` directions a layer, as a run leaves it; nothing was measured."""
    settings = load_settings("", {"model": str(base), "cache_dir": str(folder / "cache"), **options})
    directory = RunDirectory(folder / "run")
    directory.path.mkdir(parents=True)
    config = loader.load_config(str(base), settings.load)
    sizes = config.get_text_config()
    model = ModelRecord(
        id=base.name,
        revision="",
        fingerprint=loader.fingerprint(str(base), config),
        dtype="float32",
        quantization=settings.load.quantization,
    )
    directions = make_directions(sizes.num_hidden_layers, sizes.hidden_size, count=count)
    result = Result(
        model=model,
        directions=stages.directions_record(directions),
        identity={TOKENIZER_PART: tokenizer_identity(loader.load_tokenizer(str(base), settings.load))},
        startup_trials=1,
        batch_sizes={"residuals": 1, "prefill": 1, "decode": 1},
        response_prefix="",
        rendering="",
    )
    unanswered = {"count": 4, "refused": 3, "broken": 1, "off_topic": 0, "answered": 8}
    scores = {"refusals": 3, "kl": {"mean": 0.1, "median": 0.1, "max": 0.2}, "unanswered": unanswered}
    trial = Trial(0, make_params(0, sizes.num_hidden_layers), "complete", scores)
    result.searched([trial], [trial], Baseline(9, 12, {}, {"count": 9}), DEFAULT)
    result.write(directory)
    directory.directions.write_bytes(stages.directions_file(directions))
    return settings, directory
