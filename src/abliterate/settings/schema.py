"""All options of a run as one frozen value, with their names, types, ranges and defaults.

They are parsed once and passed explicitly. `configs/default.toml` shows the same options to the user; a test keeps the two
equal. An empty string means "not given" and 0 means "choose for me", because TOML has no null.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from abliterate.objectives import split
from abliterate.types import LARGEST, LARGEST_COUNT, MOST_DIRECTIONS, Shape

Interval = tuple[float, float]
Quantization = Literal["none", "bnb_4bit", "bnb_8bit"]

# The capabilities with built-in prompt sets, which lie in prompts/capabilities/.
CAPABILITIES = ("arithmetic", "code", "lists", "style")

# Tokens of a response that show whether it is a refusal or a loop. Refinement looks at so many, or at twice as many as it
# learns from if that is more.
_SHOWN = 48


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class LoadSettings(_Section):
    """How weights are loaded."""

    revision: str = ""
    dtypes: tuple[Literal["auto", "float32", "bfloat16", "float16"], ...] = Field(("auto", "bfloat16", "float32"), min_length=1)
    device_map: str = ""
    max_memory: dict[str, str] = {}
    offload_folder: str = ""
    quantization: Quantization = "none"
    dequantize: bool = False
    attn_implementation: str = ""
    trust_remote_code: bool = False
    chat_template: str = ""
    template_options: dict[str, str | bool | int | float] = {}
    template_now: str = ""
    decoder_layers: str = ""
    components: dict[str, str] = {}
    separate_kinds: bool = False
    readers: bool = False
    allow_partial: bool = False

    @field_validator("template_now")
    @classmethod
    def _check_moment(cls, text: str) -> str:
        """A date, with or without a time of day, as ISO 8601 writes it."""
        try:
            return text and datetime.fromisoformat(text).isoformat()
        except ValueError as error:
            raise ValueError(f"template_now must be a date such as 2026-03-31 or 2026-03-31T12:00:00, not {text!r}") from error

    @field_validator("template_options", mode="before")
    @classmethod
    def _read_booleans(cls, options: Any) -> Any:
        """Turn "true" and "false" into booleans: an environment variable is text, and "false" would be true to a template."""
        if not isinstance(options, dict):
            return options
        words = {"true": True, "false": False}
        return {name: words.get(value.lower(), value) if isinstance(value, str) else value for name, value in options.items()}


class PromptSettings(_Section):
    """Where the prompt sets come from, and the text around each prompt."""

    harmful: str = ""
    harmless: str = ""
    harmful_eval: str = ""
    harmless_eval: str = ""
    harmful_heldout: str = ""
    harmless_heldout: str = ""
    over_refusal: str = ""
    system: str = "You are a helpful assistant."
    prefix: str = ""
    suffix: str = ""


class ResponseSettings(_Section):
    """How responses are generated, and the response prefix that they share."""

    max_new_tokens: int = Field(100, ge=1)
    detect_prefix: bool = True
    prefix: str = ""
    prefix_prompts: int = Field(20, ge=1)
    thinking: Literal["skip", "keep"] = "skip"
    # (text that opens a thinking block, text to put instead so that the block is closed at once)
    thinking_blocks: tuple[tuple[str, str], ...] = (
        ("<think>", "<think></think>"),
        ("<thinking>", "<thinking></thinking>"),
        ("<thought>", "<thought></thought>"),
        ("<reasoning>", "<reasoning></reasoning>"),
        ("<seed:think>", "<seed:think></seed:think>"),
        ("[THINK]", "[THINK][/THINK]"),
        ("◁think▷", "◁think▷◁/think▷"),
        ("<|START_THINKING|>", "<|START_THINKING|><|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|begin_of_thought|><|end_of_thought|>"),
        ("<|inner_prefix|>", "<|inner_prefix|><|inner_suffix|>"),
        ("<|channel>thought\n", "<|channel>thought\n<channel|>"),
        *(
            (f"<|channel|>{channel}", f"<|channel|>{channel}<|end|><|start|>assistant<|channel|>final<|message|>")
            for channel in ("analysis<|message|>", "commentary<|message|>", "commentary to=")
        ),
    )
    # Tags that stand around an answer and are no part of it.
    answer_tags: tuple[str, ...] = (
        *("<answer>", "</answer>", "<response>", "</response>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        *("<|begin_of_solution|>", "<|end_of_solution|>", "<|channel|>final<|message|>", "<|start|>assistant"),
    )

    @model_validator(mode="after")
    def _check_markup(self) -> ResponseSettings:
        for opening, closed in self.thinking_blocks:
            if not opening or not closed.startswith(opening) or closed == opening:
                raise ValueError(f"thinking_blocks needs entries [opening, opening + closing], not [{opening!r}, {closed!r}]")
        if "" in self.answer_tags:
            raise ValueError("answer_tags must not hold an empty text")
        return self


class DirectionSettings(_Section):
    """How directions are computed from residuals."""

    method: str = "projected"
    count: int = Field(0, ge=0, le=MOST_DIRECTIONS)
    winsorize_quantile: float = Field(1.0, gt=0, le=1)
    protect: tuple[str, ...] = ()
    protect_ridge: float = Field(0.01, ge=0, le=LARGEST)


class EditSettings(_Section):
    """How a trial edits a matrix."""

    mode: str = "auto"
    representation: Literal["exact", "svd"] = "exact"
    rank: int = Field(3, ge=1)
    coeff_grid: float = Field(0.0, ge=0)
    direction_grid: float = Field(0.0, ge=0)
    capture_prompts: int = Field(64, ge=1, le=1024)
    capture_tokens: int = Field(24, ge=0, le=64)


class SearchSettings(_Section):
    """Search space, sampler, storage and selection. Positions and indices are fractions of n_layers − 1."""

    objectives: tuple[str, ...] = Field(("unanswered", "kl"), min_length=1)
    trials: int = Field(10, ge=0)
    seed_from: str = ""
    sampler: Literal["tpe", "gp", "nsga2"] = "tpe"
    startup: Literal["random", "sobol"] = "random"
    startup_trials: int = Field(0, ge=0)
    prior: Literal["uniform", "silhouette"] = "uniform"
    ei_candidates: int = Field(128, ge=1)
    direction_index: Interval = (0.4, 0.9)
    max_coeff: dict[str, Interval] = {"default": (0.8, 1.5), "mlp.down_proj": (-0.25, 1.5)}
    position: Interval = (0.6, 1.0)
    min_fraction: Interval = (0.0, 1.0)
    distance: float = Field(0.6, gt=0, le=1000)
    kernel: Shape = "linear"
    storage: str = ""
    select: str = "auto"
    select_max_kl: float = Field(0.1, gt=0)
    max_consecutive_failures: int = Field(10, ge=1)
    grace_seconds: float = Field(60.0, gt=0)

    @model_validator(mode="after")
    def _check_intervals(self) -> SearchSettings:
        intervals = {"direction_index": self.direction_index, "position": self.position}
        intervals |= {"min_fraction": self.min_fraction}
        for name, (low, high) in (intervals | {f"max_coeff.{k}": v for k, v in self.max_coeff.items()}).items():
            if not low <= high:
                raise ValueError(f"{name} must be [low, high] with low ≤ high, not [{low}, {high}]")
            if max(abs(low), abs(high)) > LARGEST:
                raise ValueError(f"{name} must lie within ±{LARGEST:g}, not [{low}, {high}]")
            if name in intervals and not (low >= 0 and high <= 1):
                raise ValueError(f"{name} must lie within [0, 1], not [{low}, {high}]")
        if "default" not in self.max_coeff:
            raise ValueError("max_coeff needs an entry named default")
        return self

    @property
    def n_startup_trials(self) -> int:
        """The number of start-up trials, which the sampler doesn't suggest: the given number, or 30 % of the trials."""
        return self.startup_trials or round(0.3 * self.trials)


class RefineSettings(_Section):
    """How the front is refined by gradient after the search (docs/design.md §5b)."""

    enabled: bool = True
    steps: int = Field(20, ge=1)
    betas: Literal["auto"] | Annotated[tuple[Annotated[float, Field(gt=0, le=LARGEST)], ...], Field(min_length=1)] = "auto"
    descents: int = Field(8, ge=1)
    max_refused: float = Field(0.03, ge=0, lt=1)
    margin: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] = "auto"
    learn: Literal["directions", "strengths"] = "directions"
    batch: int = Field(24, ge=1)
    tokens: int = Field(8, ge=1)
    prompts: int = Field(400, ge=2)
    validation: float = Field(0.2, gt=0, lt=1)

    @property
    def n_descents(self) -> int:
        """The number of descents, each of which gives a trial."""
        return self.descents if self.betas == "auto" else len(self.betas)


class EvaluationSettings(_Section):
    """The scorers of each trial, and how many prompts go through the model at a time."""

    scorers: tuple[str, ...] = ("refusals", "kl")
    heldout: bool = True
    heldout_scorers: tuple[str, ...] = ()
    judge_model: str = ""
    judge_label: str = ""
    markers: str = ""
    batch_size: int = Field(0, ge=0)
    max_batch_size: int = Field(128, ge=1)


class EfficiencySettings(_Section):
    """One switch per optimization; `--reference` turns them off.

    In float32 no switch but `use_amp_for_residuals` may change a trial's scores; refinement's steps add up rounding. Without
    certified stops no trial is pruned, and what the sampler learns from hopeless trials may lead it another way.
    """

    enable_residual_cache: bool = True
    residual_cache_dir: str = ""
    cache_residuals_in_memory: bool = True
    use_amp_for_residuals: bool = False
    offload_residuals_to_cpu: bool = True
    cache_clear_frequency: int = Field(0, ge=0)
    max_residuals_mb: int = Field(1024, ge=0)
    max_kept_mb: int = Field(2048, ge=0)
    use_binary_search_batch_tuning: bool = True
    enable_svd_cache: bool = True
    max_svd_cache_size: int = Field(4096, ge=1)
    use_efficient_refusal_detection: bool = True
    use_incremental_adapter_updates: bool = True
    use_global_warmup: bool = True
    use_trial_engine: bool = True
    use_shared_prefix: bool = True
    use_layer_skip: bool = True
    use_certified_stop: bool = True
    use_settled_rows: bool = True
    use_drafts: bool = True
    use_static_cache: bool = False

    def reference(self) -> EfficiencySettings:
        """All optimizations off but the single warm-up, which a fair reference has (docs/design.md §5)."""
        switches = {name: False for name, value in self if isinstance(value, bool)}
        return self.model_copy(update=switches | {"use_global_warmup": True})


class ExportSettings(_Section):
    """The export at the end of a run."""

    kind: str = "merged"
    verify: bool = True
    max_shard_size: str = "5GB"
    push: str = ""
    push_private: bool = True

    @field_validator("max_shard_size")
    @classmethod
    def _check_size(cls, text: str) -> str:
        """A size as `transformers` reads it, so that the export doesn't end with it after the search."""
        if not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)? ?[KMGT]B", text, re.IGNORECASE):
            raise ValueError(f"max_shard_size must be a size such as 5GB or 500MB, not {text!r}")
        return text


class Settings(BaseSettings):
    """All options. Precedence: command line, environment (`ABLITERATE_…`), TOML file, these defaults."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="ABLITERATE_", env_nested_delimiter="__", validate_default=True
    )

    model: str = ""
    seed: int = Field(0, ge=0, le=LARGEST_COUNT)
    device: str = "auto"
    out: str = ""
    cache_dir: str = ""
    load: LoadSettings = LoadSettings()
    prompts: PromptSettings = PromptSettings()
    response: ResponseSettings = ResponseSettings()
    directions: DirectionSettings = DirectionSettings()
    edit: EditSettings = EditSettings()
    search: SearchSettings = SearchSettings()
    refine: RefineSettings = RefineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    efficiency: EfficiencySettings = EfficiencySettings()
    export: ExportSettings = ExportSettings()

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorers of each trial: the named ones, those that are objectives, and the two that every record contains."""
        objectives = (split(text)[0] for text in self.search.objectives)
        return tuple(dict.fromkeys((*self.evaluation.scorers, *objectives, "refusals", "kl")))

    @property
    def refinement_response_tokens(self) -> int:
        """The most tokens of the responses to training prompts that refinement looks at.

        They are whole if the model may think, because an open thinking block counts as a refusal.
        """
        whole, shown = self.response.max_new_tokens, max(_SHOWN, 2 * self.refine.tokens)
        return whole if self.response.thinking == "keep" else min(whole, shown)
