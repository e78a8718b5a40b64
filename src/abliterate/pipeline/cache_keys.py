"""Name everything that results depend on: the keys of cached artifacts, and the identity of a study.

A part that is missing here gives wrong values in silence. Keys can be written as JSON and name no path of this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from abliterate import directions, edits
from abliterate._version import __version__
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.devices import device_name
from abliterate.model.loader import LoadedModel
from abliterate.model.memory import total_memory
from abliterate.objectives import ASKING, BY_MARKERS, DEFAULT, is_custom
from abliterate.pipeline.from_settings import chat_of, direction_count
from abliterate.prompts.files import digest
from abliterate.scorers import SCORERS
from abliterate.scorers.endpoint import MODEL
from abliterate.scorers.refusals import read_markers
from abliterate.scorers.yardstick import VERSION
from abliterate.settings.schema import DirectionSettings, EditSettings, Settings
from abliterate.settings.sources import config_path
from abliterate.types import Objective, Prompt

PromptLists = Sequence[Sequence[Prompt]]

FORMAT = 1
# Settings of the search that the first versions lacked.
_LATER = ("kernel", "sampler", "startup", "prior")
# Settings that choose the matrices to edit.
_CHOOSING = ("components", "readers")
# The names of two parts of a study's identity.
TOKENIZER_PART = "tokenizer"
OBJECTIVES_PART, SCORERS_PART = "set or order of objectives", "set of scorers or markers"


def residuals_key(settings: Settings, loaded: LoadedModel, chat: PromptEncoder, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that residuals depend on (docs/design.md §6). The batch size isn't: it moves only the last bits."""
    return model_key(settings, loaded) | {
        "amp": settings.efficiency.use_amp_for_residuals,
        "response_prefix": chat.response_prefix,
        "prompts": chat.digest(prompts),
    }


def means_key(settings: Settings, loaded: LoadedModel, chat: PromptEncoder, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that the means of residuals depend on, which are winsorized before they are added up."""
    statistics = {"statistics": "means", "winsorize_quantile": settings.directions.winsorize_quantile}
    return residuals_key(settings, loaded, chat, prompts) | statistics


def inputs_key(
    settings: Settings, loaded: LoadedModel, chat: PromptEncoder, sets: PromptLists, answers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Everything that what an edit mode needs of modules' inputs depends on; `answers`: ids, if it needs them along answers."""
    mode = settings.edit.mode
    return model_key(settings, loaded) | {
        "mode": [mode, edits.METHODS.origin(mode), getattr(edits.edit_method(mode), "constants", ())],
        "inputs_of": [target.name for target in loaded.targets],
        "response_prefix": chat.response_prefix,
        "prompts": [chat.digest(prompts) for prompts in sets],
        "answers": [list(ids) for ids in answers],
    }


def answers_key(
    settings: Settings, loaded: LoadedModel, chat: PromptEncoder, prompts: Sequence[Prompt], tokens: int
) -> dict[str, Any]:
    """Everything that the first tokens of the base's own answers depend on."""
    return yardstick_key(settings, loaded, chat, prompts) | {"tokens": tokens}


def batch_sizes_key(settings: Settings, loaded: LoadedModel, lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Everything that batch sizes depend on; `lengths`: numbers and tokens of prompts and responses."""
    efficiency, device = settings.efficiency, loaded.device
    key = model_key(settings, loaded) | {
        "lengths": {name: list(numbers) for name, numbers in lengths.items()},
        "limits": [settings.evaluation.max_batch_size, efficiency.max_kept_mb],
        "tuning": [efficiency.use_binary_search_batch_tuning, efficiency.use_global_warmup, efficiency.use_amp_for_residuals],
        "machine": [device_name(device), total_memory(device), torch.get_num_threads()],
    }
    # What is kept between trials takes memory for each edited matrix and direction, as much as the edit mode needs.
    kept = {name: value for name, value in _given(settings.load, *_CHOOSING).items() if name in _CHOOSING}
    needed = ("mode", "capture_prompts")
    kept |= {name: value for name, value in _given(settings.edit, *needed).items() if name in needed}
    if (count := direction_count(settings)) > 1:
        kept["directions"] = count
    if settings.load.device_map:  # it decides which devices hold what, and how much of each is left
        devices = sorted({str(parameter.device) for parameter in loaded.model.parameters()})
        kept["layout"] = [settings.load.device_map, dict(settings.load.max_memory), devices]
    return key | {"kept": kept} if kept else key


def prefix_key(settings: Settings, loaded: LoadedModel, chat: PromptEncoder, sets: PromptLists) -> dict[str, Any]:
    """Everything that the response prefix depends on."""
    return model_key(settings, loaded) | {
        "prompts": [chat.digest(prompts) for prompts in sets],
        "response": settings.response.model_dump(),
    }


def baseline_key(settings: Settings, loaded: LoadedModel, chat: PromptEncoder, sets: PromptLists) -> dict[str, Any]:
    """Everything that the base model's observation depends on; a response may end at a marker, so markers are part of it."""
    generation = loaded.model.generation_config
    return model_key(settings, loaded) | {
        "responses": "with ids",  # earlier versions kept their texts alone
        "prompts": [chat.digest(prompts) for prompts in sets],
        "response": settings.response.model_dump(),
        "response_prefix": chat.response_prefix,
        "generation": generation.to_diff_dict() if generation is not None else None,
        "scorers": _scorers(settings),
    }


def yardstick_key(settings: Settings, loaded: LoadedModel, chat: PromptEncoder, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that the base's own answers, and its measures of them, depend on; the version says how it measures."""
    generation = loaded.model.generation_config
    return model_key(settings, loaded) | {
        "definition": VERSION,
        "prompts": chat.digest(prompts),
        "response": settings.response.model_dump(),
        "response_prefix": chat.response_prefix,
        "generation": generation.to_diff_dict() if generation is not None else None,
    }


def model_key(settings: Settings, loaded: LoadedModel) -> dict[str, Any]:
    """A loaded model and the code that runs it."""
    info, tokenizer, own = loaded.info, loaded.tokenizer, type(loaded.model)
    # The class of a repository's own code; its module is named after the repository and the commit.
    code = {} if own.__module__.startswith("transformers.") else {"class": f"{own.__module__}.{own.__qualname__}"}
    return code | {
        "format": FORMAT,
        "model": info.id,
        "revision": info.revision,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "attention": str(loaded.model.config._attn_implementation),
        "decoder_layers": loaded.architecture.layers,
        "device": loaded.device.type,
        "tokenizer": tokenizer_digest(tokenizer),
        "chat_template": [_digest(tokenizer.chat_template), dict(settings.load.template_options)],
        "rendering": rendering(settings, loaded),
        "versions": {"abliterate": __version__} | {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def study_identity(
    settings: Settings,
    loaded: LoadedModel,
    chat: PromptEncoder,
    sets: PromptLists,
    objectives: Sequence[Objective] = DEFAULT,
    protected: PromptLists = (),
) -> dict[str, str]:
    """Hashes of everything that a trial's meaning depends on, by a name that a person looks for; a resume compares them."""
    search = settings.search
    space = [search.direction_index, search.max_coeff, search.position, search.min_fraction, search.distance]
    later = {name: value for name, value in _given(search, *_LATER).items() if name in _LATER}
    info = loaded.info
    parts: dict[str, Any] = {
        "model": [info.fingerprint, info.dtype, info.quantization],
        "set of prompts": [digest(prompts) for prompts in sets],
        TOKENIZER_PART: _tokenizer(loaded.tokenizer),
        "attention implementation": str(loaded.model.config._attn_implementation),
        "set of template options": settings.load.template_options,
        "set of edited modules": [
            loaded.architecture.layers,
            [(target.name, target.component) for target in loaded.targets],
        ],
        "precision of residuals (use_amp_for_residuals)": settings.efficiency.use_amp_for_residuals,
        "response length or prefix": [settings.response.max_new_tokens, chat.response_prefix],
        "set of thinking blocks or answer tags": [settings.response.thinking_blocks, settings.response.answer_tags],
        "direction method": _method(settings.directions) | directions.METHODS.origin(settings.directions.method),
        "edit mode": _edit(settings.edit),
        "search space": [space, search.ei_candidates, *([later] if later else [])],
        "seed": settings.seed,
        SCORERS_PART: _scorers(settings),
    }
    if protected:
        ridge = settings.directions.protect_ridge
        parts["set of protected capabilities"] = [ridge, [digest(prompts) for prompts in protected]]
    if settings.load.template_now:  # otherwise the parts above decide how prompts are rendered
        parts["moment at which prompts are rendered (load.template_now)"] = [chat.digest(prompts) for prompts in sets]
    if tuple(objectives) != BY_MARKERS:  # the first versions had these objectives and didn't name them
        parts[OBJECTIVES_PART] = [[objective.name, objective.goal] for objective in objectives]
    return {name: _digest(part) for name, part in parts.items()}


def _edit(section: EditSettings) -> dict[str, Any]:
    """What an edit depends on; the tokens of answers only where the mode needs them."""
    needed = edits.needs_answers(edits.edit_method(section.mode))
    given = _given(section, "capture_prompts", "capture_tokens") | edits.METHODS.origin(section.mode)
    return {name: value for name, value in given.items() if name != "capture_tokens"} | (
        {"capture_tokens": section.capture_tokens} if needed else {}
    )


def _method(section: DirectionSettings) -> dict[str, Any]:
    """How directions are computed, but for what is protected: its prompts count, and not where they come from."""
    return {name: value for name, value in _given(section, "count").items() if name not in ("protect", "protect_ridge")}


def _given(section: BaseModel, *later: str) -> dict[str, Any]:
    """A section of the settings without those of the `later` settings that have their default: runs from before lack them."""
    defaults = {name: section.__class__.model_fields[name].get_default() for name in later}
    return {name: value for name, value in section.model_dump().items() if name not in defaults or value != defaults[name]}


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """The part of a study's identity, named `TOKENIZER_PART`, that says which tokenizer and chat template it was made with."""
    return _digest(_tokenizer(tokenizer))


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    return [tokenizer_digest(tokenizer), tokenizer.chat_template]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(content, dict):
        # These two belong to the last call and not to the tokenizer.
        content |= {"padding": None, "truncation": None}
    return _digest([content, tokenizer.special_tokens_map])


def rendering(settings: Settings, loaded: LoadedModel) -> str:
    """A hash of a rendered prompt: a template may write the date, and this package decides where a system prompt goes."""
    chat = chat_of(settings, loaded.tokenizer, loaded.device)
    return _digest(chat.render(Prompt("Hello", settings.prompts.system)))


def _scorers(settings: Settings) -> list[Any]:
    """Everything that scores depend on: names, markers, a custom scorer's content, a plugin's version, a classifier's model."""
    evaluation, names = settings.evaluation, []
    for name in settings.scorers:
        path, _, class_name = name.rpartition(":")
        content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if is_custom(name) else ""
        names.append(" ".join([f"{class_name} {content}" if content else name, *SCORERS.origin(name).values()]))
    judges = [[evaluation.judge_model, evaluation.judge_label]] if "classifier" in names else []
    # Only the model that is asked, which the environment names: the same model may be served at another address.
    judges += [[os.environ.get(MODEL, "")]] if set(names) & set(ASKING) else []
    return [names, sorted(_markers(settings)), *judges]


def _markers(settings: Settings) -> tuple[str, ...]:
    """The markers themselves, because the default file may differ between versions."""
    return read_markers(Path(settings.evaluation.markers or config_path("markers.txt")))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
