"""Coverage: what is edited, what is left out and why; the record of `inspect`, with weights and from the config alone."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import app
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader
from abliterate.errors import AbliterateError, InputError
from abliterate.evaluation.likelihood import OwnAnswers
from abliterate.model import loader
from abliterate.model.architectures import ATTENTION, MLP, find_targets
from abliterate.model.coverage import Coverage, check_coverage, coverage_of
from abliterate.model.footprint import Shape
from abliterate.model.thinking import Markup
from abliterate.pipeline import run as pipeline_run
from abliterate.pipeline.preflight import check_model
from abliterate.pipeline.requirements import Workload, _asked, requirements_of
from abliterate.pipeline.yardstick import yardstick_of
from abliterate.prompts.sets import PromptSets
from abliterate.scorers.unanswered import kinds_of
from abliterate.scorers.yardstick import Yardstick
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.terminal.quantities import in_words
from abliterate.types import BatchSizes, Prompt
from support.models import _IDS, CPU, find_architecture, make_chat, make_model, make_tokenizer, save_model
from support.runs import Recorder, quick_settings
from support.zoo import ZOO, load_specimen, make_specimen

ONLY_ATTENTION = {ATTENTION: "self_attn.o_proj"}


def covered(name: str, components: dict[str, str] | None = None) -> Coverage:
    """Coverage of a specimen, as the table says or as the settings name it."""
    model = make_specimen(name)
    model_type = model.config.get_text_config().model_type
    architecture = find_architecture(model_type, ZOO[name].stack if components else "", components)
    return coverage_of(model, architecture, find_targets(model, architecture, 32))


def test_every_familys_config_tells_its_shape() -> None:
    """Names and kinds of entries differ: a list of sizes, a count of sublayers, nothing at all."""
    for name, specimen in ZOO.items():
        config = getattr(transformers, specimen.config)(**_IDS, **specimen.options).get_text_config()
        shape = Shape.of(config, torch.float16)
        assert shape.d_model == 32, name
        assert shape.n_layers in (len(specimen.layers), 2 * len(specimen.layers)), name
        assert all(type(size) is int and size > 0 for size in (shape.heads, shape.kv_heads, shape.head_dim, shape.widest)), name


def test_a_family_that_is_not_in_the_table_is_unknown_without_measuring(tmp_path: Path) -> None:
    make_specimen("biogpt").config.save_pretrained(tmp_path / "m")
    assert loader.skeleton(str(tmp_path / "m"), LoadSettings(), CPU) is None


def test_what_the_settings_do_not_name_is_left_out() -> None:
    coverage = covered("mixtral", ONLY_ATTENTION)
    # W_o is 32 × 32, four experts have 32 × 48 each.
    assert coverage.share == pytest.approx(32 * 32 / (32 * 32 + 4 * 32 * 48))
    (left,) = coverage.left_out
    assert (left.path, left.layers, left.matrices, left.left_out) == ("mlp.experts", 3, 12, "not named in load.components")
    assert coverage.by_component()[MLP] == {"matrices": 0, "parameters": 0, "share": 0.0}
    said: list[str] = []
    with pytest.raises(InputError, match=r"Only 14% of .*mlp\.experts in 3 layers \(not named in .*--allow-partial"):
        check_coverage(coverage, allow_partial=False, warn=said.append)
    check_coverage(coverage, allow_partial=True, warn=said.append)
    assert len(said) == 1
    assert "14.3%" in said[0]
    assert "mlp.experts" in said[0]


def test_most_but_not_all_is_a_warning() -> None:
    coverage = covered("deepseek_v3", {ATTENTION: "self_attn.o_proj", MLP: "mlp.down_proj|mlp.experts"})
    assert 0.5 < coverage.share < 1
    said: list[str] = []
    check_coverage(coverage, allow_partial=False, warn=said.append)
    assert "mlp.shared_experts.down_proj in 2 layers" in said[0]
    check_coverage(covered("deepseek_v3"), allow_partial=False, warn=said.append)
    assert len(said) == 1


def test_settings_that_name_all_are_whole() -> None:
    assert covered("mixtral", ONLY_ATTENTION | {MLP: "mlp.experts"}).share == 1


def test_settings_are_measured_against_structure_where_there_is_no_row() -> None:
    coverage = covered("biogpt", {ATTENTION: "self_attn.out_proj"})
    assert [group.path for group in coverage.left_out] == ["fc2"]
    assert coverage.untold == ""


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    model = make_specimen("gemma3n")  # several streams: its structure is unclear
    model.config.model_type = "unknown"
    model.config.get_text_config().model_type = "unknown"
    architecture = find_architecture("unknown", "model.layers", ONLY_ATTENTION)
    coverage = coverage_of(model, architecture, find_targets(model, architecture, 32))
    said: list[str] = []
    check_coverage(coverage, allow_partial=False, warn=said.append)
    assert "the size of the rest is unknown" in said[0]
    assert "structure is unclear" in said[0]


def test_experts_of_an_unknown_kind_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.model.experts._DECORATED", ("something_else",))
    coverage = covered("qwen3_moe")
    (left,) = coverage.left_out
    assert (left.path, left.matrices, left.shape) == ("mlp.experts", 12, None)
    assert left.parameters == 3 * 4 * 32 * 16  # what writes, not what gates
    assert "Qwen3MoeExperts" in left.left_out


def test_experts_that_are_a_list_where_the_row_has_a_stack_are_left_out_and_said() -> None:
    """Old code that comes with a model; named by the settings, each is edited."""
    model = make_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(32, 48, bias=False), "w2": nn.Linear(48, 32, bias=False)}) for _ in range(4)
        )
    row = find_architecture("mixtral")
    coverage = coverage_of(model, row, find_targets(model, row, 32))
    (left,) = coverage.left_out
    assert (left.path, left.matrices, left.parameters) == ("mlp.experts", 12, 12 * 32 * 48)
    assert coverage.share < 0.5
    named = find_architecture("mixtral", "model.layers", ONLY_ATTENTION | {MLP: "mlp.experts.*.w2"})
    whole = coverage_of(model, named, find_targets(model, named, 32))
    assert [group.path for group in whole.groups if not group.left_out] == ["self_attn.o_proj", "mlp.experts.*.w2"]


# Inspect


def record(name: str, **settings: Any) -> dict[str, Any]:
    """The record of a specimen with its weights, for a usual workload."""
    return requirements_of(Settings(**settings), load_specimen(name), CPU, Workload.usual("a test"))


def test_parameters_per_token_are_those_a_token_meets() -> None:
    cost = record("llama")["cost"]
    model = make_specimen("llama")
    inner = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 2)
    assert cost["parameters_per_token"] == inner + model.lm_head.weight.numel()
    routed, model = record("mixtral")["cost"], make_specimen("mixtral")
    experts = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 3)
    inner = sum(
        p.numel()
        for module in model.model.layers.modules()
        for p in module.parameters(recurse=False)
        if isinstance(module, nn.Linear)
    )
    assert routed["parameters_per_token"] == inner + experts // 2 + model.lm_head.weight.numel()


def test_cost_is_what_the_reference_feeds() -> None:
    """Tokens that enter the first layer in one evaluation in full, one prompt at a time: no pads."""
    loaded, response = load_specimen("llama"), 6
    chat = make_chat()
    harmful = tuple(Prompt(f"Tell me how to squash hat number {index}.") for index in range(3))
    harmless = tuple(Prompt(f"Where is the carpet? {'Here. ' * index}") for index in range(4))
    work = Workload.of(PromptSets(harmful, harmless, harmful, harmless), chat)
    fed = 0

    def count(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal fed
        fed += (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()

    loaded.model.generation_config.eos_token_id = None  # every response runs to its limit
    handle = loaded.layers[0].register_forward_pre_hook(count, with_kwargs=True)
    engine = ReferenceEngine(
        loaded.model,
        chat,
        ResponseReader(chat.tokenizer, Markup(())),
        max_new_tokens=response,
        sizes=BatchSizes.same(1),
    )
    engine.observe(harmful, harmless, lambda done, total: None)
    handle.remove()
    settings = Settings(response={"max_new_tokens": response}, search={"objectives": ("refusals", "kl")})  # type: ignore[arg-type]
    cost = requirements_of(settings, loaded, CPU, work)["cost"]
    assert fed == cost["tokens"]["trial_at_most"] - len(harmful)  # the last token of a response isn't fed again
    assert cost["tokens"]["run_at_most"] == cost["tokens"]["residuals"] + 11 * cost["tokens"]["trial_at_most"]


def test_seconds_are_tokens_by_speed() -> None:
    speeds = {"residuals": 100.0, "prefill": 50.0, "decode": 10.0}
    settings = Settings(search={"trials": 9, "objectives": ("refusals", "kl")})  # type: ignore[arg-type]
    cost = requirements_of(settings, load_specimen("llama"), CPU, Workload.usual(""), speeds)["cost"]
    once = 2 * 100 * 64 / 50 + 100 * 100 / 10
    nothing = {"yardstick_at_most": 0.0, "refinement_at_most": 0.0}
    whole = {"residuals": 512.0, "trial_at_most": once, "run_at_most": 512.0 + 10 * once} | nothing
    assert cost["seconds"] == whole


def test_inputs_cost_what_is_fed_to_capture_them() -> None:
    """Prompts of 64 tokens, and beside them, for some edits, answers that are made and fed again behind their prompts."""
    found = {}
    for mode, prompts in (("full", 5), ("arbitrary-rank", 5), ("least-squares", 5), ("least-squares", 1000)):
        settings = Settings(edit={"mode": mode, "capture_prompts": prompts, "capture_tokens": 3})  # type: ignore[arg-type]
        cost = requirements_of(settings, load_specimen("llama"), CPU, Workload.usual(""))["cost"]
        found[mode, prompts] = cost["tokens"]["residuals"] - 800 * 64
    assert found == {
        ("full", 5): 0,
        ("arbitrary-rank", 5): 10 * 64,
        ("least-squares", 5): 10 * 64 + 5 * 2 * (64 + 3),
        ("least-squares", 1000): 800 * 64 + (1024 // 3) * 2 * (64 + 3),
    }


def test_the_scorer_costs_what_it_shows_the_base() -> None:
    """The tokens of all rows that the base is asked about: a trial's answers, and the yardstick's."""
    response, fed = 40, 0
    prompts = {
        name: tuple(Prompt(f"Tell me how to squash hat number {index + start}.") for index in range(6))
        for name, start in (("harmful_eval", 10), ("harmless", 20))
    }
    chat = make_chat()

    class Base:
        ends = frozenset({0})
        harmless = prompts["harmless"]

        def logprobs(self, asked: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
            nonlocal fed
            fed += sum(len(chat.token_ids(prompt)) + len(ids) for prompt, ids in zip(asked, answers, strict=True))
            return [-torch.ones(len(ids), dtype=torch.float64) for ids in answers]

        def logprobs_beside(self, asked: Sequence[Prompt], answers: Sequence[Sequence[int]], token: int) -> list[torch.Tensor]:
            return [torch.stack([own, own]) for own in self.logprobs(asked, answers)]

        def yardstick(self) -> Yardstick:
            return Yardstick({"surprise": 9.0, "distinct": 0.0, "end": 9.0, "topic": -9.0}, 6, {})

    answers = [(*range(1, response), 0)] * 6
    work = Workload.of(PromptSets(*(prompts[name] for name in ("harmless", "harmless", "harmful_eval", "harmful_eval"))), chat)
    asked, yardstick = _asked(Settings(response={"max_new_tokens": response}), work)  # type: ignore[arg-type]
    assert kinds_of(Base(), prompts["harmful_eval"], range(6), answers) == ["answered"] * 6
    assert fed == asked
    fed = 0
    noted = [dict.fromkeys((None, 0), -torch.ones(len(ids), dtype=torch.float64)) for ids in answers]
    yardstick_of(Base(), OwnAnswers(answers, answers, noted))
    made = 2 * sum(len(chat.token_ids(prompt)) + response for prompt in prompts["harmless"])
    assert fed + made == yardstick


def test_refinement_costs_its_steps_and_the_trials_whose_answers_it_makes() -> None:
    """2 · 10 steps of 5 + 5 rows of 64 + 4 tokens: forward once, backward twice, and all 400 harmless rows by the base."""
    refine = {"enabled": True, "steps": 10, "betas": [1.0, 2.0], "batch": 5, "tokens": 4, "validation": 0.25}
    settings = Settings(search={"trials": 0}, refine=refine)  # type: ignore[arg-type]
    cost = requirements_of(settings, load_specimen("llama"), CPU, Workload.usual(""))["cost"]["tokens"]
    # Two looks and two losses at a quarter of 400 + 400 rows, of which the base sees the harmless ones, too.
    looks = 4 * 100 * 3 * 68
    # Two trials; the answers of 12 teachers to 16 prompts and of one to 400, the base's own, and twice those of two refined
    # models to a quarter of them: 13.92 times the 100 evaluation prompts.
    assert cost["refinement_at_most"] == 20 * 10 * 3 * 68 + 400 * 68 + looks + 16 * cost["trial_at_most"]
    parts = ("residuals", "yardstick_at_most", "trial_at_most", "refinement_at_most")
    assert cost["run_at_most"] == sum(cost[part] for part in parts)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_5_moe", "gemma3_vl"])
def test_config_alone_gives_the_same_record(name: str, tmp_path: Path) -> None:
    folder = save_model(make_specimen(name), tmp_path / "m")
    settings = Settings(model=str(folder))
    skeleton = loader.skeleton(str(folder), settings.load, CPU)
    loaded = loader.load_model(str(folder), settings.load, CPU, lambda tokenizer, at: make_chat().encode([Prompt("Hi")]), print)
    assert skeleton is not None
    found, expected = (requirements_of(settings, one, CPU, Workload.usual("a test")) for one in (skeleton, loaded))
    for one in (found, expected):
        del one["device"]
        for operation in one["memory"]["operations"].values():
            del operation["prompts_that_fit"]  # depends on what is free
    assert found == expected


def test_words_name_everything() -> None:
    words = in_words(record("deepseek_v3"))
    assert "deepseek" in words["model"]
    assert words["coverage"].splitlines()[0] == "100 % of the parameters that write to the residual stream"
    assert "mlp.experts in 2 layers, 8 matrices of 32 × 16" in words["coverage"]
    assert words["assumed"] == "64 tokens a prompt: a test"
    assert record("biogpt")["model"]["found_by"] == "structure"
    assert "by structure" in in_words(record("biogpt"))["model"]
    assert record("qwen3_5")["model"]["layer_kinds"] == {"linear_attention": 2, "full_attention": 1}


def test_exports_that_are_not_possible_are_said(tmp_path: Path) -> None:
    folder = save_model(make_specimen("falcon_h1"), tmp_path / "m")
    skeleton = loader.skeleton(str(folder), LoadSettings(), CPU)
    assert skeleton is not None
    found = requirements_of(Settings(), skeleton, CPU, Workload.usual(""))["exports"]
    assert found["merged"] == ""
    assert "incompatible with Mamba" in found["adapter"]
    assert "fused experts" in record("mixtral")["exports"]["adapter"]
    assert record("llama")["exports"]["adapter"] == ""


# Runs and the command line


def test_run_stops_where_less_than_half_is_edited_before_prompts_are_read(tmp_path: Path) -> None:
    folder = save_model(make_specimen("mixtral"), tmp_path / "m")
    load = {"decoder_layers": "model.layers", "components": ONLY_ATTENTION}
    settings = Settings(model=str(folder), load=load, prompts={"harmful": str(tmp_path / "missing.txt")})
    with pytest.raises(InputError, match="--allow-partial"):
        pipeline_run.run(settings, Recorder(), RunDirectory(tmp_path / "run"))
    check_model(settings, editing=False)
    with pytest.raises(InputError, match=r"missing\.txt"):
        pipeline_run.run(
            settings.model_copy(update={"load": LoadSettings(**load, allow_partial=True)}),
            Recorder(),
            RunDirectory(tmp_path / "run"),
        )


def test_partial_run_says_what_it_leaves_out(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    folder = save_model(make_specimen("mixtral"), tmp_path / "m")
    (tmp_path / "markers.txt").write_text("e\n", encoding="utf-8")
    settings = quick_settings(
        prompt_files,
        tmp_path / "cache",
        model=str(folder),
        load={"decoder_layers": "model.layers", "components": ONLY_ATTENTION, "allow_partial": True},
        search={"trials": 1},
        response={"max_new_tokens": 2},
        evaluation={"markers": str(tmp_path / "markers.txt")},
        export={"kind": "none"},
    )
    recorder = Recorder()
    directory = RunDirectory(tmp_path / "run")
    with contextlib.suppress(AbliterateError):  # what a random model refuses is chance: there may be no front
        pipeline_run.run(settings, recorder, directory)
    assert any("14.3% of the parameters" in warning and "mlp.experts" in warning for warning in recorder.warnings)
    coverage = Result.read(directory).coverage
    assert coverage is not None
    assert coverage["share"] == pytest.approx(1 / 7)
    assert [group["path"] for group in coverage["groups"] if not group["edited"]] == ["mlp.experts"]


def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    """The command line within this process."""
    monkeypatch.setattr(sys, "argv", ["abliterate", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        app.main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_command_from_a_lone_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_specimen("qwen3_moe").config.save_pretrained(tmp_path / "m")
    code, out, _ = invoke(capsys, monkeypatch, "inspect", tmp_path / "m", "--no-weights", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert found["event"] == "result"
    assert found["coverage"]["share"] == 1
    assert found["cost"]["assumed"]
    assert str(tmp_path) not in json.dumps(found["model"])
    refined = ("--no-weights", "--json", "--set", "refine.enabled=true", "--set")
    for mode, refines in (("full", True), ("arbitrary-rank", False)):
        _, out, _ = invoke(capsys, monkeypatch, "inspect", tmp_path / "m", *refined, f"edit.mode={mode}")
        assert (json.loads(out.splitlines()[-1])["cost"]["tokens"]["refinement_at_most"] > 0) is refines
    code, out, _ = invoke(capsys, monkeypatch, "inspect", tmp_path / "m", "--no-weights")
    assert code == 0
    assert "mlp.experts in 3 layers, 12 matrices" in out
    assert "not known without the weight files" in out
    make_tokenizer().save_pretrained(tmp_path / "m")
    code, _, err = invoke(capsys, monkeypatch, "inspect", tmp_path / "m")
    assert code == 2
    assert "can't be loaded" in err


def test_command_with_weights_measures_speed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prompt_files: dict[str, str]
) -> None:
    given = [("--set", f"prompts.{name}={path}") for name, path in prompt_files.items()]
    options = ["inspect", "demo", "--cache-dir", tmp_path / "cache", "--json", *(one for pair in given for one in pair)]
    code, out, _ = invoke(capsys, monkeypatch, *options)
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert found["cost"]["seconds"]["run_at_most"] > 0
    assert found["cost"]["prompts"]["harmful_eval"]["count"] == 12
    _, again, _ = invoke(capsys, monkeypatch, *options)
    assert json.loads(again.splitlines()[-1])["cost"]["seconds"] == found["cost"]["seconds"]  # from the cache


def test_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = invoke(capsys, monkeypatch, "inspect", tmp_path / "nothing", "--no-weights")
    assert code == 2
    assert "There is no model directory" in err
    config = make_specimen("llama").config
    config.save_pretrained(tmp_path / "m")
    raw = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": 0}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    code, _, err = invoke(capsys, monkeypatch, "inspect", tmp_path / "m", "--no-weights")
    assert code == 2
    assert "num_hidden_layers (0) is wrong: it must be at least 1" in err
