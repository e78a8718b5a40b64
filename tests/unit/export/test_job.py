"""Exports reload as what the trial was, and nothing half-written ever carries the final name."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from abliterate.edits import SvdMemo
from abliterate.errors import AbliterateError, InputError
from abliterate.export import EXPORTERS, ExportJob, adapter, check_output, companions, finished_folder, leave_record, model_card
from abliterate.export.card import is_visible
from abliterate.export.folder import MARKER
from abliterate.model.architectures import find_targets
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, architecture_of
from abliterate.model.readers import with_gains
from abliterate.settings.schema import EditSettings, ExportSettings, LoadSettings
from abliterate.types import Kernel, Objective, TrialParams
from support.contracts import ExporterContract
from support.exports import CARD_FACTS, FLOAT32, ON, make_case, make_job, odd_checkpoint, renamed_checkpoint, write, zero_row
from support.models import logits_of, make_directions, make_editor, make_loaded, make_model, make_params, save_model


def trial_of(model: PreTrainedModel, folder: Path, seed: int = 0, **settings: Any) -> tuple[ExportJob, Tensor, LoadedModel]:
    """A saved model, a trial on it: its job and its logits."""
    loaded = make_loaded(model, str(save_model(model, folder / "base")))
    editor = make_editor(loaded, **settings)
    params = make_params(seed)
    editor.apply(params)
    return make_job(loaded, editor.factors(params)), logits_of(loaded.model), loaded


def peft_logits(job: ExportJob, folder: Path) -> Tensor:
    """What a user gets with plain PEFT."""
    base = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    return logits_of(PeftModel.from_pretrained(base, str(folder)).eval())


class TestMerged(ExporterContract):
    """The default."""

    exporter = EXPORTERS["merged"]


class TestAdapter(ExporterContract):
    """In PEFT's format."""

    exporter = EXPORTERS["adapter"]


@pytest.mark.parametrize("mode", ["full", "pre", "none"])
@pytest.mark.parametrize("family", ["llama_biased", "qwen2", "gpt2"])
def test_merged_equals_trial(family: str, mode: str, tmp_path: Path) -> None:
    job, expected, _ = trial_of(make_model(family), tmp_path, mode=mode)
    write("merged", job, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(reloaded), expected, **FLOAT32)


def test_merged_of_bf16_stored_model_within_tolerance(tmp_path: Path) -> None:
    stored = make_model("llama").bfloat16()
    folder = save_model(stored, tmp_path / "base")
    loaded = make_loaded(stored.float(), str(folder))
    editor = make_editor(loaded)
    editor.apply(make_params(0))
    facts = write("merged", make_job(loaded, editor.factors(make_params(0))), tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.dtype == torch.bfloat16
    assert facts["dtype"] == "bfloat16"
    found, expected = logits_of(reloaded.float()), logits_of(loaded.model)
    assert (found - expected).norm() / expected.norm() < 0.02


def test_merged_leaves_other_weights_alone(tmp_path: Path) -> None:
    model = make_model("llama")
    job, _, _ = trial_of(model, tmp_path)
    write("merged", job, tmp_path / "out")
    base = dict(AutoModelForCausalLM.from_pretrained(job.source).named_parameters())
    changed = {
        name.removesuffix(".weight")
        for name, parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters()
        if not torch.equal(parameter, base[name])
    }
    assert changed == set(job.factors)


def test_merged_of_renamed_tensors_is_streamed(tmp_path: Path) -> None:
    job, expected, _ = trial_of(make_model("llama"), tmp_path)
    renamed_checkpoint(Path(job.source))
    base = load_file(Path(job.source) / "model.safetensors")
    assert write("merged", job, tmp_path / "out")["streamed"] is True
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == base.keys()
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, base[name])}
    assert changed == {f"{name.removeprefix('model.')}.weight" for name in job.factors}
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, **FLOAT32)


def test_merged_as_a_whole_in_shards(tmp_path: Path) -> None:
    job, expected, _ = trial_of(make_model("llama"), tmp_path)
    odd_checkpoint(Path(job.source))
    facts = write("merged", replace(job, export=ExportSettings(max_shard_size="40KB")), tmp_path / "out")
    assert facts["streamed"] is False
    assert "is stored as F64" in facts["reason"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, **FLOAT32)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_companions_are_carried_over(kind: str, tmp_path: Path) -> None:
    model = make_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=[3, 2], pad_token_id=0, repetition_penalty=1.25)
    job, _, loaded = trial_of(model, tmp_path)
    write(kind, job, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert tokenizer("Hello there")["input_ids"] == loaded.tokenizer("Hello there")["input_ids"]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.repetition_penalty) == ([3, 2], 1.25)
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "the licence of the base\n"
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "the card"


@pytest.mark.parametrize("mode", ["full", "pre", "none"])
@pytest.mark.parametrize("family", ["llama_biased", "gpt2"])
def test_adapter_reloads_with_plain_peft(family: str, mode: str, tmp_path: Path) -> None:
    job, expected, _ = trial_of(make_model(family), tmp_path, mode=mode)
    facts = write("adapter", job, tmp_path / "out")
    assert (facts["method"], facts["rank"]) == ("dora" if mode == "full" else "lora", 1)
    torch.testing.assert_close(peft_logits(job, tmp_path / "out"), expected, **FLOAT32)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("mode", ["full", "pre", "none"])
def test_zero_row_survives(kind: str, mode: str, tmp_path: Path) -> None:
    job, expected, _ = trial_of(zero_row(make_model("llama")), tmp_path, mode=mode)
    assert "model.layers.1.mlp.down_proj" in job.factors
    write(kind, job, tmp_path / "out")
    if kind == "adapter":
        found = peft_logits(job, tmp_path / "out")
    else:
        found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, **FLOAT32)


@pytest.mark.parametrize("mode", ["full", "pre", "none"])
@pytest.mark.parametrize("family", ["llama_biased", "gpt2"])
def test_adapter_of_several_directions_reloads_with_plain_peft(family: str, mode: str, tmp_path: Path) -> None:
    """Its rank is the largest number of directions that a module loses; a layer loses two of three here."""
    model = zero_row(make_model(family)) if family != "gpt2" else make_model(family)
    loaded = make_loaded(model, str(save_model(model, tmp_path / "base")))
    editor = make_editor(loaded, mode=mode, count=3)
    editor.directions.vectors[2, 0] = 0
    params = replace(ON, scope="per layer")
    editor.apply(params)
    expected, job = logits_of(loaded.model), make_job(loaded, editor.factors(params))
    assert {factors.a.shape[0] for factors in job.factors.values()} == {2, 3}
    facts = write("adapter", job, tmp_path / "out")
    assert (facts["method"], facts["rank"]) == ("dora" if mode == "full" else "lora", 3)
    found = peft_logits(job, tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_svd_adapter_is_plain_lora_of_that_rank(tmp_path: Path) -> None:
    job, expected, _ = trial_of(make_model("llama"), tmp_path, representation="svd", rank=3)
    facts = write("adapter", job, tmp_path / "out")
    assert (facts["method"], facts["rank"]) == ("lora", 3)
    torch.testing.assert_close(peft_logits(job, tmp_path / "out"), expected, **FLOAT32)


def test_svd_merged_equals_svd_trial(tmp_path: Path) -> None:
    job, expected, _ = trial_of(make_model("llama"), tmp_path, representation="svd", rank=3)
    write("merged", job, tmp_path / "out")
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, **FLOAT32)


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("mode", ["full", "none"])
def test_unknown_module_is_an_error(kind: str, mode: str, tmp_path: Path) -> None:
    job, _, _ = trial_of(make_model("llama"), tmp_path, mode=mode)
    some = next(iter(job.factors.values()))
    with pytest.raises(AbliterateError, match=r"no module model\.layers\.9\.mlp\.down_proj"):
        write(kind, replace(job, factors={**job.factors, "model.layers.9.mlp.down_proj": some}), tmp_path / "out")


def test_adapter_of_nothing_is_an_error(tmp_path: Path) -> None:
    job, _, _ = trial_of(make_model("llama"), tmp_path)
    with pytest.raises(AbliterateError, match="edits no module"):
        write("adapter", replace(job, factors={}), tmp_path / "out")


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_exporter_loads_its_own_without_warnings(kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    job, expected, _ = trial_of(make_model("llama"), tmp_path)
    write(kind, job, tmp_path / "out")
    reloaded = EXPORTERS[kind].load(tmp_path / "out", job, torch.device("cpu"), torch.float32)
    assert [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)] == []
    torch.testing.assert_close(logits_of(reloaded), expected, **FLOAT32)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mode", ["full", "none"])
def test_exports_of_modules_that_read_are_the_trial(mode: str, count: int, tmp_path: Path) -> None:
    """Read back by plain PEFT and transformers, with norms whose weights aren't ones."""
    model, load = make_model("llama"), LoadSettings(readers=True)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data.uniform_(0.5, 1.5)
    path = save_model(model, tmp_path / "base")
    loaded = make_loaded(AutoModelForCausalLM.from_pretrained(path), str(path))
    row = architecture_of(loaded.model, load)
    targets = find_targets(loaded.model, row, loaded.info.d_model)
    directions = with_gains(make_directions(loaded.info.n_layers, loaded.info.d_model, count=count), loaded.model, targets)
    editor = Editor(targets, directions, EditSettings(mode=mode), EditHooks(targets), SvdMemo(0))
    params = TrialParams("global", 1.3, dict.fromkeys(row.components, Kernel(0.8, 1.0, 0.8, 9.0)))
    job = replace(make_job(replace(loaded, architecture=row, targets=targets), editor.factors(params)), load=load)
    assert len(job.factors) == 7 * loaded.info.n_layers
    editor.apply(params)
    expected = logits_of(loaded.model)
    for kind in ("merged", "adapter"):
        write(kind, job, tmp_path / kind)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, **FLOAT32)
    base = AutoModelForCausalLM.from_pretrained(path)
    assert (logits_of(base) - expected).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits_of(adapted), expected, **FLOAT32)
    assert adapted.peft_config["default"].use_dora is (mode == "full")
    assert adapted.peft_config["default"].r == count


FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


def write_half(final: Path, error: Exception) -> None:
    """An export that fails in the middle."""
    with finished_folder(final) as folder:
        (folder / "part").write_text("half", encoding="utf-8")
        raise error


def write_whole(final: Path, text: str) -> None:
    """An export of one file."""
    with finished_folder(final) as folder:
        (folder / "f").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("error", FULL_DISK, ids=["os", "safetensors"])
@pytest.mark.parametrize("old", [False, True])
def test_full_disk_leaves_nothing_half_written(error: Exception, old: bool, tmp_path: Path) -> None:
    final = tmp_path / "model"
    if old:
        write_whole(final, "old")
    with pytest.raises(AbliterateError, match="No space left") as caught:
        write_half(final, error)
    assert "nothing half-written" in str(caught.value)
    assert "repeat the command" in str(caught.value)  # `export` has no --resume
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if old else [])
    assert not old or (final / "f").read_text(encoding="utf-8") == "old"


def test_other_errors_pass_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="else"), finished_folder(tmp_path / "model"):
        raise RuntimeError("something else")
    assert list(tmp_path.iterdir()) == []


def test_finished_folder_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()  # an empty directory may be taken
    for text in ("first", "second"):
        write_whole(final, text)
    assert (final / "f").read_text(encoding="utf-8") == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_export_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    final, told = tmp_path / "model", list[str]()
    write_whole(final, "first")
    (final / MARKER).write_text('{"format": 1}', encoding="utf-8")
    leave_record(final, {"trial": 3})
    with finished_folder(final, warn=told.append) as folder:
        (folder / "f").write_text("second", encoding="utf-8")
    (kept,) = (path for path in tmp_path.iterdir() if path != final)
    assert (kept / "f").read_text(encoding="utf-8") == "first"
    assert "It isn't recorded which files" in told[0]


def test_an_old_export_with_a_persons_files_is_kept(tmp_path: Path) -> None:
    final, told = tmp_path / "model", list[str]()
    write_whole(final, "first")
    leave_record(final, {"trial": 3})  # the record of its check leaves the list of its files
    (final / ".DS_Store").write_text("", encoding="utf-8")
    write_whole(final, "second")
    (final / "folder").mkdir()
    (final / "folder" / "Model-F16.gguf").write_text("mine", encoding="utf-8")
    with finished_folder(final, warn=told.append) as folder:
        (folder / "f").write_text("third", encoding="utf-8")
    assert (final / "f").read_text(encoding="utf-8") == "third"
    (kept,) = (path for path in tmp_path.iterdir() if path != final)
    assert (kept / "folder" / "Model-F16.gguf").read_text(encoding="utf-8") == "mine"
    assert len(told) == 1
    assert kept.name in told[0]


@pytest.mark.parametrize("out", [".", "model", "model/.."])
def test_the_model_itself_is_never_replaced(out: str, tmp_path: Path) -> None:
    """It may be an earlier export, which would pass for one that can be replaced."""
    model = tmp_path / "model"
    write_whole(model, "weights")
    (tmp_path / MARKER).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="holds the model that the export is made from; choose another --out"):
        check_output(tmp_path / out, str(model))
    check_output(tmp_path / "other", str(model))
    check_output(model, "some/model-on-the-hub")


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    for name in ("model", "model.old", "model.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("…", encoding="utf-8")
    (tmp_path / "file").write_text("…", encoding="utf-8")
    for name in ("model", "file"):
        with pytest.raises(InputError, match="is no export of abliterate"):
            write_whole(tmp_path / name, "new")
    write_whole(tmp_path / "other", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "model.old", "model.partial", "other"]
    assert all((tmp_path / name / "thesis.tex").is_file() for name in ("model", "model.old", "model.partial"))


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "model"

    def export() -> None:
        with finished_folder(final):
            final.mkdir()
            (final / "mine").write_text("…", encoding="utf-8")

    with pytest.raises(InputError, match="is no export"):
        export()
    assert [path.name for path in final.iterdir()] == ["mine"]
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("killed", [False, True])
def test_the_old_export_outlives_a_failed_rename(killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    write_whole(final, "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            if killed:
                monkeypatch.setattr(Path, "rename", forbidden)  # nothing more happens after a kill
                monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    def forbidden(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt if killed else AbliterateError):
        write_whole(final, "new")
    kept = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]  # where a person would look
    assert [(path / "f").read_text(encoding="utf-8") for path in kept] == ["old"]
    assert killed or kept == [final]


def test_card_says_what_was_measured() -> None:
    facts = CARD_FACTS
    card = model_card(facts)
    assert "(exact)" in card
    assert card.endswith("the recipe")
    assert "90 harmless prompts" in card
    assert ", harmless prompts" in model_card(facts | {"n_harmless": None})  # a result without its prompts
    assert "base_model" not in model_card(facts | {"on_hub": False})  # a directory's name is no Hub id
    lossy = model_card(facts | {"representation": "svd", "approximation": {"mean": 0.034, "max": 0.0712}})
    assert "(svd, which misses 3.4% of a matrix's change on average, 7.1% at most)" in lossy
    for part in ("base_model: owner/name", "(revision abc)", "| 97 | 12 |", "mean 0.0512", "max 0.4000", "trial 7", "seed 3"):
        assert part in card
    assert "# owner/name, with refusal ablated" in card
    assert "It refuses less than the base model" in card
    assert "\n- abliterated\n" in card
    # Objectives may ask for something else than fewer refusals.
    words = facts | {"objectives": (Objective("my words", "maximize"),)}
    for after, said in ((97, "as many as"), (98, "more than")):
        other = " ".join(model_card(words | {"after": after}).split())
        assert "altered on purpose**, by a search over `my words` (maximized)." in other
        assert f"Of the harmful prompts below it refuses {said} the base model does." in other
        assert "# owner/name, with a direction ablated" in other
        for part in ("refuses less", "refusal ablated", "it refuses from", "- abliterated"):
            assert part not in other
    assert "It refuses less" in model_card(words)


def test_an_adapter_names_the_commit_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT loads the base with it; a folder has none."""
    load, job = LoadSettings(revision="abc123"), make_case(tmp_path).job
    assert adapter._commit(replace(job, source="somebody/model", load=load)) == "abc123"
    assert adapter._commit(replace(job, load=load)) is None
    assert adapter._commit(replace(job, source="somebody/model", load=LoadSettings())) is None
    monkeypatch.setattr(adapter, "_commit", lambda job: "abc123")
    write("adapter", job, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))["revision"] == "abc123"


@pytest.mark.parametrize("name", ["Screenshot 9.41\u202fAM.txt", "質問\u3000集.txt", "\U0001f469\u200d\U0001f680.txt"])
def test_names_with_other_spaces_are_names(name: str) -> None:
    assert is_visible(name)
    assert companions.is_companion(name)
    assert not is_visible(name + "\x1b")
    assert not is_visible(name + "\u202e")
