"""Test classes for implementations of the seams: inherit a class, and give it your implementation.

The tests of the built-in scorers, direction methods, edit methods, exporters and model families do so, and so can a plugin's:

    class TestMedian(DirectionContract):
        method = Median()
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from abliterate.directions import (
    Blend,
    DirectionMethod,
    Directions,
    compute_directions,
    count_of,
    needs_means,
    summarize_residuals,
    winsorize,
)
from abliterate.edits import EditMethod, prepare
from abliterate.errors import AbliterateError
from abliterate.export import Exporter, ExportJob
from abliterate.export.base_weights import Matrices
from abliterate.export.check_weights import by_definition, check_weights
from abliterate.export.recipe import hashes
from abliterate.model.architectures import ATTENTION, MLP, known_architecture
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel
from abliterate.model.structure import find_stack, writers_of
from abliterate.scorers import Observation, Response, Scorer
from abliterate.scorers.base import EarlyScorer, Follower, Judge, ignores_responses
from abliterate.settings.schema import ExportSettings, LoadSettings
from abliterate.types import Kernel, Score, TrialParams
from support.asked import END, MadeBase
from support.models import (
    PROMPTS,
    logits_of,
    make_directions,
    make_editor,
    make_loaded,
    make_model,
    make_params,
    save_model,
    write_dense,
)

RESPONSES = (
    Response("I'm sorry, no.", ids=(3, 4, 5, END)),
    Response("First, take a cloth.", ids=(6, 7, 8, 9, END)),
    Response(" ", ids=(2, END)),
    Response("half", thinking_open=True, ids=(2, 3)),
)
_LOGPROBS = torch.log_softmax(torch.arange(8.0).view(2, 4), -1)
SEEN = Observation(RESPONSES, _LOGPROBS, (*PROMPTS, PROMPTS[0]), MadeBase())


class ScorerContract:
    """The properties that trials and `result.json` rely on; give the fixture `scorer`."""

    @pytest.fixture
    def scorer(self) -> Scorer:
        """A new instance of the scorer."""
        raise NotImplementedError

    def test_its_score_is_a_number_and_a_record(self, scorer: Scorer) -> None:
        scorer.setup(SEEN)
        score = scorer.score(SEEN)
        assert isinstance(score, Score)
        assert (score.name, score.goal) == (scorer.name, scorer.goal)
        assert score.goal in ("minimize", "maximize", "none")
        assert isinstance(score.value, float)
        json.dumps(score.record, allow_nan=False)
        assert scorer.score(SEEN) == score  # no observation leaves a state to the next
        if ignores_responses(scorer):
            assert scorer.score(Observation((), SEEN.first_logprobs)) == score

    def test_what_it_says_early_is_what_it_says_at_last(self, scorer: Scorer) -> None:
        scorer.setup(SEEN)
        if isinstance(scorer, EarlyScorer):
            count = sum(scorer.counts(response) for response in SEEN.responses)
            bound, score = scorer.at_least(count, len(SEEN.responses)), scorer.score(SEEN)
            assert bound.value <= score.value if isinstance(scorer, Follower) else bound == score
            assert scorer.stream().feed("nothing of interest") in (False, True)

    def test_its_verdicts_are_one_for_each_response(self, scorer: Scorer) -> None:
        scorer.setup(SEEN)
        if isinstance(scorer, Judge):
            assert len(scorer.verdicts(SEEN)) == len(SEEN.responses)


class DirectionContract:
    """The properties that the pipeline relies on; give the attribute `method`."""

    method: DirectionMethod

    def compute(self, harmful: Tensor, harmless: Tensor, quantile: float = 1.0) -> Tensor:
        """The directions (n_layers+1, count, d_model), computed from residuals or means as the method demands."""
        needed = (summarize_residuals(part, self.method, quantile) for part in (harmful, harmless))
        vectors = compute_directions(self.method, *needed).vectors
        return vectors if vectors.ndim == 3 else vectors[:, None]

    def test_is_given_what_it_needs(self) -> None:
        residuals = torch.randn(7, 4, 16, generator=torch.Generator().manual_seed(0))
        needed = summarize_residuals(residuals, self.method, 0.8)
        expected = winsorize(residuals, 0.8)
        if needs_means(self.method):
            assert needed.dtype == torch.float64
            torch.testing.assert_close(needed, expected.double().mean(0), rtol=0, atol=1e-12)
        else:
            assert torch.equal(needed, expected)

    def test_gives_unit_rows_of_the_right_shape(self) -> None:
        """Of several directions, those that a method doesn't find in so few prompts are zero, and come last."""
        generator = torch.Generator().manual_seed(0)
        found = self.compute(torch.randn(7, 4, 16, generator=generator) + 1, torch.randn(5, 4, 16, generator=generator))
        assert found.shape == (4, count_of(self.method, 0), 16)
        assert found.dtype == torch.float32
        norms = found.norm(dim=2)
        assert torch.allclose(norms, norms.round(), atol=1e-6)
        assert (norms.round().diff(dim=1) <= 0).all()
        assert (norms[:, 0] > 0.5).all()

    def test_finds_a_planted_direction(self) -> None:
        generator = torch.Generator().manual_seed(1)
        harmless = torch.randn(40, 3, 12, generator=generator)
        harmful = torch.randn(40, 3, 12, generator=generator)
        harmful[..., 5] += 20
        # Well above chance (0.3); a projection reduces the component a little.
        assert (self.compute(harmful, harmless, 0.999)[:, 0, 5] > 0.8).all()

    def test_equal_sets_have_no_direction(self) -> None:
        """A method that finds several directions may find how the prompts differ; of equal prompts, none finds any."""
        same = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(2))
        if not hasattr(self.method, "compute_several"):
            assert self.compute(same, same.flip(0)).count_nonzero() == 0
        rounded = same[:1] * (1 + 1e-7 * torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(3)))
        assert self.compute(rounded, rounded.flip(0)).count_nonzero() == 0

    def test_neither_the_order_of_prompts_nor_the_scale_matters(self) -> None:
        generator = torch.Generator().manual_seed(4)
        harmful, harmless = torch.randn(12, 3, 10, generator=generator) + 1, torch.randn(12, 3, 10, generator=generator)
        found, order = self.compute(harmful, harmless), torch.randperm(12, generator=generator)
        torch.testing.assert_close(self.compute(harmful[order], harmless[order]), found, rtol=0, atol=1e-5)
        torch.testing.assert_close(self.compute(3 * harmful, 3 * harmless), found, rtol=0, atol=1e-5)

    def test_is_deterministic_and_leaves_other_random_numbers_alone(self) -> None:
        residuals = torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(5))
        torch.manual_seed(6)
        found, drawn = self.compute(*residuals), torch.rand(1)
        torch.manual_seed(6)
        assert torch.equal(torch.rand(1), drawn)
        assert torch.equal(self.compute(*residuals), found)


class EditContract:
    """The properties that trials, exports and their checks rely on; give the attribute `method`."""

    method: EditMethod

    def edited(self, weight: Tensor, directions: Directions, x: float, coeff: float) -> Tensor:
        """W' (float64) by the method's factors."""
        prepared = self.method.prepare(lambda: weight, directions.table().double())
        factors = self.method.factors(prepared, directions.blend(x), coeff)
        scale = factors.entry_scale()
        scaled = weight.double() if scale is None else scale.double() * weight.double()
        return scaled + factors.b.double() @ factors.a.double()

    def defined(self, weight: Tensor, directions: Directions, x: float, coeff: float) -> Tensor:
        """W' (float64) by the method's definition."""
        return self.method.dense(weight.double(), _unit(directions, x), coeff)

    @pytest.mark.parametrize("coeff", [0.3, 1.0, 1.5])
    @pytest.mark.parametrize("shape", [(8, 8), (16, 40), (33, 7), (1, 5), (1500, 12)], ids=str)
    def test_factors_equal_the_definition(self, shape: tuple[int, int], coeff: float) -> None:
        weight, directions = _weight(*shape), make_directions(3, shape[0], 1)
        for x in (0.0, 1.37, 2.0):
            found, expected = self.edited(weight, directions, x, coeff), self.defined(weight, directions, x, coeff)
            assert torch.isfinite(found).all()
            # d_out = 1 at λ = 1 leaves nothing, so the error is relative to W where W' is smaller.
            assert float((found - expected).norm()) <= 1e-6 * max(float(expected.norm()), float(weight.norm()))

    def test_definition_by_rows_is_the_definition(self) -> None:
        weight, v = _weight(40, 30).double(), _unit(make_directions(3, 40, 1), 1.3)
        weight[17] = 0
        by_rows = by_definition(self.method, v[None], [0.9], chunk=7 * 30)(weight)
        found = torch.cat([by_rows(slice(start, start + 7)) for start in range(0, 40, 7)])
        torch.testing.assert_close(found, self.method.dense(weight, v, 0.9), rtol=1e-12, atol=1e-13)

    def test_several_directions_are_removed_as_by_definition(self) -> None:
        if type(self.method).product is EditMethod.product:
            pytest.skip("it removes one direction")
        weight, vectors = _weight(40, 30), make_directions(3, 40, 1).table().double()
        coeffs, alone = torch.tensor([0.9, -0.3, 1.2], dtype=torch.float64), [Blend((row,), (1.0,)) for row in range(3)]
        product = self.method.product(self.method.prepare(lambda: weight, vectors), alone, coeffs)
        expected = by_definition(self.method, vectors, coeffs.tolist(), chunk=7 * 30)(weight)
        rows = torch.cat([expected(slice(start, start + 8)) for start in range(0, 40, 8)])
        assert _relative(product.delta(weight).double(), rows - weight.double()) < 1e-5

    @pytest.mark.parametrize("coeff", [0.3, 1.0, 1.5])
    def test_zero_rows_spread_nothing(self, coeff: float) -> None:
        weight, directions = _weight(12, 20), make_directions(3, 12, 1)
        weight[[0, 5, 11]] = 0
        found = self.edited(weight, directions, 0.4, coeff)
        assert torch.isfinite(found).all()
        assert _relative(found, self.defined(weight, directions, 0.4, coeff)) <= 1e-6

    def test_a_zero_matrix_is_left_alone(self) -> None:
        assert self.edited(torch.zeros(6, 4), make_directions(3, 6, 1), 1.5, 1.0).count_nonzero() == 0

    @pytest.mark.parametrize("coeff", [0.999, 1.0, 1.001])
    @pytest.mark.parametrize("noise", [3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    def test_nearly_one_hot_directions(self, noise: float, coeff: float) -> None:
        generator = torch.Generator().manual_seed(4)
        vectors = noise * torch.randn(3, 16, generator=generator)
        vectors[:, 7] = 1
        directions = Directions(torch.nn.functional.normalize(vectors, dim=1))
        weight = torch.randn(16, 24, generator=generator)
        found, expected = self.edited(weight, directions, 0.0, coeff), self.defined(weight, directions, 0.0, coeff)
        assert _relative(found, expected) <= 1e-6

    def test_coeff_zero_is_the_identity(self) -> None:
        weight, directions = _weight(10, 14), make_directions(3, 10, 1)
        assert _relative(self.edited(weight, directions, 1.2, 0.0), weight.double()) < 1e-7
        assert _relative(self.edited(weight, directions, 1.2, 1e-9), weight.double()) < 1e-7

    def test_half_precision_weights_are_read_exactly(self) -> None:
        weight, directions = _weight(16, 24).bfloat16(), make_directions(3, 16, 1)
        found = self.edited(weight, directions, 0.7, 1.0)
        assert _relative(found, self.defined(weight, directions, 0.7, 1.0)) <= 1e-6

    def test_prepared_parts_blend_linearly(self) -> None:
        """Preparing an interpolated direction gives the interpolation of the prepared parts."""
        weight, directions = _weight(14, 18), make_directions(3, 14, 1)
        blend, v = directions.blend(1.3), _unit(directions, 1.3)
        table = self.method.prepare(lambda: weight, directions.table().double())
        alone = self.method.prepare(lambda: weight, v[None])
        pair = [self.method.factors(*given, 1.0).delta(weight) for given in ((table, blend), (alone, Blend((0,), (1.0,))))]
        assert _relative(*pair) < 1e-6

    def test_fused_experts_are_edited_one_by_one(self) -> None:
        stack, directions = torch.stack([_weight(12, 8, seed) for seed in range(3)]), make_directions(3, 12, 1)
        prepared = prepare(self.method, lambda: stack, directions.table().double())
        factors = self.method.factors(prepared, directions.blend(1.3), 0.9)
        for weight, part in zip(stack, factors.parts(), strict=True):
            change = self.edited(weight, directions, 1.3, 0.9) - weight.double()
            assert _relative(part.delta(weight).double(), change) < 1e-5

    def test_a_column_scale_keeps_the_norms_of_columns(self) -> None:
        weight, directions = _weight(12, 20), make_directions(3, 12, 1)
        prepared = self.method.prepare(lambda: weight, directions.table().double())
        if self.method.factors(prepared, directions.blend(1.3), 0.9).column_scale is not None:
            found = self.edited(weight, directions, 1.3, 0.9)
            assert torch.allclose(found.norm(dim=0), weight.double().norm(dim=0), rtol=1e-5)

    def test_a_row_scale_keeps_the_norms_of_rows(self) -> None:
        """The adapter export writes such an edit as DoRA, whose magnitudes are the base's norms."""
        weight, directions = _weight(12, 20), make_directions(3, 12, 1)
        prepared = self.method.prepare(lambda: weight, directions.table().double())
        if self.method.factors(prepared, directions.blend(1.3), 0.9).row_scale is not None:
            found = self.edited(weight, directions, 1.3, 0.9)
            assert torch.allclose(found.norm(dim=1), weight.double().norm(dim=1), rtol=1e-5)


@dataclass(frozen=True)
class Case:
    """A trial on a saved model: its export job, and the editor that computed its factors."""

    job: ExportJob
    loaded: LoadedModel
    editor: Editor
    params: TrialParams


class ExporterContract:
    """The properties that `abliterate export` and its checks rely on; give the attribute `exporter`."""

    exporter: Exporter

    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        """A trial of plain ablation on a tiny model."""
        model = make_model("llama")
        loaded = make_loaded(model, str(save_model(model, tmp_path / "base")))
        editor, params = make_editor(loaded, mode="none"), make_params(0)
        parts = (loaded.architecture, loaded.tokenizer, editor.factors(params))
        job = ExportJob(loaded.info.source, "sha256:0", LoadSettings(), ExportSettings(), *parts, "tiny", "the card")
        return Case(job, loaded, editor, params)

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """Export into a folder."""
        folder.mkdir(exist_ok=True)
        return self.exporter.write(job, folder)

    def check(self, case: Case, folder: Path) -> dict[str, bool]:
        """Check the export in `folder` against the edits' definition."""
        base = Matrices(case.job.source, case.job.load, case.job.architecture)
        definitions = {
            name: by_definition(case.editor._method, *case.editor.vectors(case.params, key))
            for name, key in case.editor.plan(case.params).items()
        }
        reread = self.exporter.reread(folder, case.job, base)
        return check_weights(base, reread, definitions, lambda done, total: None).record["checks"]

    def test_reads_back_as_the_trial(self, case: Case, tmp_path: Path) -> None:
        self.write(case.job, tmp_path / "out")
        model = self.exporter.load(tmp_path / "out", case.job, torch.device("cpu"), torch.float32)
        case.editor.apply(case.params)
        torch.testing.assert_close(logits_of(model), logits_of(case.loaded.model), rtol=1e-4, atol=1e-5)

    def test_its_files_are_the_edit_by_definition(self, case: Case, tmp_path: Path) -> None:
        self.write(case.job, tmp_path / "out")
        assert self.check(case, tmp_path / "out") == {"weights": True, "untouched": True}

    def test_an_edit_left_out_is_found(self, case: Case, tmp_path: Path) -> None:
        kept = dict(sorted(case.job.factors.items())[1:])
        self.write(replace(case.job, factors=kept), tmp_path / "out")
        assert not all(self.check(case, tmp_path / "out").values())

    def test_an_equal_job_gives_equal_files(self, case: Case, tmp_path: Path) -> None:
        self.write(case.job, tmp_path / "out")
        first = hashes(tmp_path / "out")
        self.write(case.job, tmp_path / "again")
        assert hashes(tmp_path / "again") == first
        self.write(case.job, tmp_path / "out")  # continues from the files of a killed export
        assert hashes(tmp_path / "out") == first

    def test_has_card_and_tokenizer_and_says_what_it_is(self, case: Case, tmp_path: Path) -> None:
        facts = self.write(case.job, tmp_path / "out")
        json.dumps(dict(facts), allow_nan=False)
        assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "the card"
        assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello")["input_ids"]

    def test_an_unknown_module_is_an_error(self, case: Case, tmp_path: Path) -> None:
        factors = {**case.job.factors, "model.layers.9.mlp.down_proj": next(iter(case.job.factors.values()))}
        with pytest.raises(AbliterateError, match=r"no module model\.layers\.9\.mlp\.down_proj"):
            self.write(replace(case.job, factors=factors), tmp_path / "out")


class ArchitectureContract:
    """The layers of a family behave as its row claims; give the fixture `model`, a tiny model with random weights."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        """A tiny model of the family, float32."""
        raise NotImplementedError

    @pytest.fixture
    def loaded(self, model: PreTrainedModel) -> LoadedModel:
        """The loaded model with the row's modules."""
        return make_loaded(model)

    def test_the_row_is_found_by_the_models_type(self, model: PreTrainedModel, loaded: LoadedModel) -> None:
        row = known_architecture(model.config.get_text_config().model_type)
        assert row is not None
        assert row.found_by == "table"
        assert loaded.architecture == row

    def test_the_row_names_what_writes_to_the_residual_stream(self, loaded: LoadedModel) -> None:
        """A measurement on the layers: the row leaves out no module that writes, and names no other module."""
        path, calls = find_stack(loaded.model, loaded.info.d_model)
        written = writers_of(loaded.layers, calls, loaded.info.d_model)
        found = {f"{path}.{index}.{writer.path}" for index, layer in enumerate(written) for writer in layer}
        assert {target.name for target in loaded.targets} == found

    def test_edited_logits_are_the_dense_ones(self, loaded: LoadedModel) -> None:
        editor = make_editor(loaded)
        kernels = {name: Kernel(1.3, 0.5, 0.6, 2.0 * loaded.info.n_layers) for name in (ATTENTION, MLP)}
        params = TrialParams("per layer", 1.0, kernels)
        base, dense = logits_of(loaded.model), copy.deepcopy(loaded.model)
        editor.apply(params)
        assert editor.hooks.active == {target.name for target in loaded.targets}
        write_dense(dense, editor, params, "full")
        found = logits_of(loaded.model)
        torch.testing.assert_close(found, logits_of(dense), rtol=1e-3, atol=2e-5)
        assert (found - base).abs().max() > 1e-3
        editor.clear()
        assert torch.equal(logits_of(loaded.model), base)


def _weight(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    """A matrix whose rows have very different norms, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, d_in, generator=generator) * torch.logspace(-2, 2, d_out)[:, None]


def _unit(directions: Directions, x: float) -> Tensor:
    return directions.blend(x).of(directions.table().double())


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
