"""Merged exports are the base's own files: every byte but those of the edited matrices, and little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from abliterate.errors import AbliterateError, InputError
from abliterate.export import ExportJob, base_weights, check_output, finished_folder, merged
from abliterate.export.folder import LOCK, MARKER
from abliterate.export.safetensors_copy import INDEX, SINGLE, NotStreamable, check_dtype, copy_edited, read_header, shard_files
from abliterate.settings.schema import LoadSettings
from support.exports import make_job, raw, write
from support.models import logits_of, make_editor, make_loaded, make_model, make_params, save_large, save_model
from support.peaks import peak_of_a_merged_export

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> ExportJob:
    """A trial on a model of several files."""
    stored = make_model("llama").to(getattr(torch, request.param))
    folder = save_model(stored, tmp_path / "base")
    (folder / SINGLE).unlink()
    stored.save_pretrained(folder, max_shard_size="30KB")
    loaded = make_loaded(stored.float(), str(folder))
    return make_job(loaded, make_editor(loaded).factors(make_params(0)))


def test_untouched_tensors_are_byte_for_byte_the_bases(job: ExportJob, tmp_path: Path) -> None:
    facts = write("merged", job, tmp_path / "out")
    assert facts["streamed"] is True
    base, out = Path(job.source), tmp_path / "out"
    files = shard_files(base)
    assert len(files) > 3
    before, after = raw(base), raw(out)
    assert list(before) == list(after)
    changed = {name.removesuffix(".weight") for name in before if before[name] != after[name]}
    assert changed == set(job.factors)
    for name in (INDEX, "config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    for path in files:
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert (out / path.name).read_bytes()[:length] == path.read_bytes()[:length], "the header, metadata and order"


def test_edits_are_those_of_a_loaded_model(job: ExportJob, tmp_path: Path) -> None:
    """Equal to editing every matrix by hand in float32 and rounding once."""
    write("merged", job, tmp_path / "out")
    base = {name: tensor for path in shard_files(Path(job.source)) for name, tensor in load_file(path).items()}
    found = {name: tensor for path in shard_files(tmp_path / "out") for name, tensor in load_file(path).items()}
    for name, factors in job.factors.items():
        weight = base[f"{name}.weight"].double()
        scale = torch.ones(len(weight)) if factors.row_scale is None else factors.row_scale
        expected = scale[:, None].double() * weight + factors.b.double() @ factors.a.double()
        stored = found[f"{name}.weight"]
        step = torch.finfo(stored.dtype).eps * expected.abs() + 1e-6
        assert ((stored.double() - expected).abs() <= step).all()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = make_model("llama").config
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    loaded = make_loaded(model, str(save_model(model, tmp_path / "base")))
    write("merged", make_job(loaded, make_editor(loaded).factors(make_params(0))), tmp_path / "out")
    assert "lm_head.weight" not in raw(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()


def test_large_matrices_are_edited_by_chunks(tmp_path: Path) -> None:
    model = make_model("gpt2")
    loaded = make_loaded(model, str(save_model(model, tmp_path / "base")))
    editor = make_editor(loaded)
    editor.apply(make_params(0))
    expected = logits_of(loaded.model)
    (tmp_path / "out").mkdir()
    facts = merged.Merged(chunk=100).write(make_job(loaded, editor.factors(make_params(0))), tmp_path / "out")
    assert facts["streamed"] is True
    found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_full_disk_is_seen_before_the_first_byte(job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 90, 10))
    with pytest.raises(AbliterateError, match="MiB are free"):
        write("merged", job, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


class Hub:
    """A Hub that fetches files of a directory into a snapshot, one by one as they are asked for."""

    def __init__(self, folder: Path, snapshot: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.snapshot, self.asked = folder, snapshot, list[str]()
        snapshot.mkdir()
        patch.setattr(base_weights, "cached_file", self.fetch)
        patch.setattr(base_weights, "skip_retries_without_network", lambda: None)
        patch.setattr(base_weights, "load_config", lambda *_: AutoConfig.from_pretrained(folder))

    def fetch(self, name: str, file: str, *, revision: str, **options: bool) -> str | None:
        assert (name, revision) == ("owner/name", "abc")
        self.asked.append(file)
        if (self.folder / file).is_file():
            return str(shutil.copyfile(self.folder / file, self.snapshot / file))
        if options["_raise_exceptions_for_missing_entries"]:
            raise OSError(f"owner/name has no {file}")
        return None

    def job(self, job: ExportJob) -> ExportJob:
        return dataclasses.replace(job, source="owner/name", load=job.load.model_copy(update={"revision": "abc"}))


def test_what_of_a_hub_model_is_not_here_is_fetched(job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine than the run's, where only the config has been looked at."""
    hub = Hub(Path(job.source), tmp_path / "snapshot", monkeypatch)
    monkeypatch.setattr(merged, "save_companions", lambda job, folder: None)
    facts = write("merged", hub.job(job), tmp_path / "out")
    assert facts["streamed"] is True
    files = [path.name for path in shard_files(Path(job.source))]
    assert hub.asked == ["config.json", SINGLE, INDEX, *files]
    write("merged", job, tmp_path / "local")
    assert raw(tmp_path / "out") == raw(tmp_path / "local")


def test_a_hub_model_of_one_file_has_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(save_model(make_model("llama"), tmp_path / "base"), tmp_path / "snapshot", monkeypatch)
    load = LoadSettings(revision="abc")
    assert base_weights.checkpoint_folder("owner/name", load) == tmp_path / "snapshot"
    assert hub.asked == ["config.json", SINGLE]


@pytest.mark.parametrize("lacks", ["weights", "a file"])
def test_a_hub_model_that_cannot_be_fetched(
    lacks: str, job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(Path(job.source), tmp_path / "snapshot", monkeypatch)
    if lacks == "weights":
        (hub.folder / INDEX).unlink()
        with pytest.raises(NotStreamable, match="neither"):
            base_weights.checkpoint_folder("owner/name", LoadSettings(revision="abc"))
    else:
        shard_files(hub.folder)[2].unlink()
        with pytest.raises(InputError, match="check the id and the network"):
            base_weights.checkpoint_folder("owner/name", LoadSettings(revision="abc"))


def damaged(folder: Path, how: str) -> None:
    """A checkpoint that can't be streamed."""
    path = folder / SINGLE
    if how == "no files":
        path.unlink()
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-10])
    elif how == "no header":
        path.write_bytes(b"\xff" * 100)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "not json":
        path.write_bytes((10).to_bytes(8, "little") + b"not json.." + b"0" * 10)
    elif how == "index elsewhere":
        path.unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../base.safetensors"}}), encoding="utf-8")


@pytest.mark.parametrize("how", ["no files", "short", "no header", "empty", "not json", "index elsewhere"])
def test_what_cannot_be_streamed_is_told_before_writing(how: str, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3, 4)}, tmp_path / SINGLE)
    damaged(tmp_path, how)
    with pytest.raises(NotStreamable):
        [read_header(path) for path in shard_files(tmp_path)]


@pytest.mark.parametrize("tensor", [torch.ones(3), torch.ones(3, 4, dtype=torch.int8), torch.ones(3, 4, dtype=torch.bfloat16)])
def test_only_matrices_of_floats_are_edited(tensor: torch.Tensor, tmp_path: Path) -> None:
    save_file({"a.weight": tensor}, tmp_path / SINGLE)
    with pytest.raises(NotStreamable, match=r"a\.weight is stored as"):
        check_dtype("a.weight", read_header(tmp_path / SINGLE)["a.weight"], torch.float32, 2)


def test_copies_keep_every_byte(tmp_path: Path) -> None:
    tensors = {"z": torch.randn(5, 3), "a": torch.arange(6, dtype=torch.int64), "m": torch.randn(2, 2).bfloat16()}
    save_file(tensors, tmp_path / "old", {"format": "pt", "note": "kept"})
    copy_edited(tmp_path / "old", tmp_path / "new", {}, piece=7)
    assert (tmp_path / "new").read_bytes() == (tmp_path / "old").read_bytes()
    edits = {"m": lambda tensor: tensor.fill_(2)}
    copy_edited(tmp_path / "old", tmp_path / "new", edits, piece=7)  # type: ignore[arg-type]
    found = load_file(tmp_path / "new")
    assert found["m"].tolist() == [[2, 2], [2, 2]]
    assert torch.equal(found["z"], tensors["z"])
    assert torch.equal(found["a"], tensors["a"])


def copies(monkeypatch: pytest.MonkeyPatch, killed_at: int = 99) -> list[str]:
    """Names of the files that are copied; the process dies in the middle of one."""
    seen: list[str] = []

    def copy(source: Path, target: Path, edits: Any) -> None:
        seen.append(source.name)
        if len(seen) == killed_at:
            target.write_bytes(source.read_bytes()[:20])
            os._exit(9)
        copy_edited(source, target, edits)

    monkeypatch.setattr(merged, "copy_edited", copy)
    return seen


def export(job: ExportJob, final: Path) -> None:
    """As a run exports."""
    with finished_folder(final, job.key("merged")) as folder:
        merged.Merged().write(job, folder)


def killed_export(job: ExportJob, final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export in a process that dies at the third file."""
    child = os.fork()
    if child == 0:
        try:
            copies(monkeypatch, killed_at=3)
            export(job, final)
        finally:
            os._exit(0)  # whatever happens, the child must not go on with the tests
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_export_goes_on_where_it_was(job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    killed_export(job, final, monkeypatch)
    assert not final.exists()
    assert (tmp_path / ".model.partial").is_dir()
    seen = copies(monkeypatch)
    export(job, final)
    files = [path.name for path in shard_files(Path(job.source))]
    assert seen == files[2:], "the first two were finished"
    export(job, tmp_path / "other")
    assert raw(final) == raw(tmp_path / "other")
    names = {path.name for path in final.iterdir()}
    assert names == {path.name for path in (tmp_path / "other").iterdir()}
    assert not any(name.endswith((".part", LOCK)) for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "other"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_going_on_needs_room_for_the_rest_only(job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "model"
    killed_export(job, final, monkeypatch)
    left = sum(path.stat().st_size for path in shard_files(Path(job.source))[2:])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, left))
    export(job, final)
    assert final.is_dir()


def test_a_failed_export_leaves_nothing(job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "save_companions", lambda job, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(job, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("what", ["another trial", "another base"])
def test_what_another_export_left_is_not_taken_up(
    what: str, job: ExportJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "model"
    killed_export(job, final, monkeypatch)
    if what == "another base":
        other = dataclasses.replace(job, fingerprint="sha256:1")
    else:
        name = next(iter(job.factors))
        changed = dataclasses.replace(job.factors[name], b=2 * job.factors[name].b)
        other = dataclasses.replace(job, factors={**job.factors, name: changed})
    seen = copies(monkeypatch)
    export(other, final)
    assert seen == [path.name for path in shard_files(Path(job.source))]
    assert final.is_dir()
    assert not (tmp_path / ".model.partial").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_a_kill_around_the_rename_leaves_nothing_forgotten(moment: str, job: ExportJob, tmp_path: Path) -> None:
    final = tmp_path / "model"
    child = os.fork()
    if child == 0:
        rename, unlink = Path.rename, Path.unlink
        if moment == "before the rename":
            Path.rename = lambda self, target: os._exit(9) if target == final else rename(self, target)  # type: ignore[assignment,method-assign,return-value]
        else:
            Path.unlink = lambda self, **options: os._exit(9) if self.name == LOCK else unlink(self, **options)  # type: ignore[assignment,method-assign]
        export(job, final)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if moment == "after the rename":
        assert AutoModelForCausalLM.from_pretrained(final) is not None
    assert final.exists() is (moment == "after the rename")
    other = dataclasses.replace(job, fingerprint="sha256:1")
    export(other, final)
    export(other, final)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
    assert not (final / LOCK).exists()


@pytest.mark.parametrize("left", ["nothing", MARKER])
def test_what_earlier_versions_left_is_taken_up(left: str, tmp_path: Path) -> None:
    """They removed the lock before the rename, or, on failure, before the folder."""
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    if left == MARKER:
        (partial / MARKER).write_text("{}", encoding="utf-8")
        (partial / "weights").write_text("old", encoding="utf-8")
    with finished_folder(tmp_path / "model", "key") as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_exports_at_once_keep_out_of_each_others_way(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with finished_folder(final) as first:
        (first / "f").write_text("first", encoding="utf-8")
        with finished_folder(final) as second:
            assert second != first
            (second / "f").write_text("second", encoding="utf-8")
        assert (final / "f").read_text(encoding="utf-8") == "second"
    assert (final / "f").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_hidden_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / ".model.partial"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("…", encoding="utf-8")
    with finished_folder(tmp_path / "model") as folder:
        assert folder != theirs
    assert (theirs / "thesis.tex").is_file()
    assert (tmp_path / "model").is_dir()


def test_links_in_a_folder_that_looks_left_behind_arent_followed(tmp_path: Path) -> None:
    partial, mine = tmp_path / ".model.partial", tmp_path / "mine"
    partial.mkdir()
    mine.write_text("precious", encoding="utf-8")
    mine.chmod(0o600)
    (partial / LOCK).symlink_to(mine)
    with finished_folder(tmp_path / "model", "key") as folder:
        assert folder != partial
    (partial / LOCK).unlink()
    (partial / LOCK).write_text("key", encoding="utf-8")
    (partial / "a.safetensors").symlink_to(mine)
    shutil.rmtree(tmp_path / "model")
    with finished_folder(tmp_path / "model", "key") as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
    assert (mine.read_text(encoding="utf-8"), mine.stat().st_mode & 0o777) == ("precious", 0o600)


@pytest.mark.parametrize("name", ["model", ".model.partial"])
def test_a_link_isnt_followed(name: str, tmp_path: Path) -> None:
    """In a stranger's run it may lead to an export of one's own, whose files an export would replace."""
    mine = tmp_path / "mine"
    with finished_folder(mine) as folder:
        (folder / "weights").write_text("mine", encoding="utf-8")
    (tmp_path / name).symlink_to(mine)
    if name == "model":
        with pytest.raises(InputError, match="is a link; choose another --out"):
            check_output(tmp_path / name)
    else:
        with finished_folder(tmp_path / "model", "key") as folder:
            assert folder != tmp_path / name
        assert not (tmp_path / "model").is_symlink()
    assert (mine / "weights").read_text(encoding="utf-8") == "mine"


def test_the_top_of_a_file_system_is_no_folder_for_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder can be renamed to it, so the export would fail once everything is written."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "volume")
    with pytest.raises(InputError, match="top of a file system; choose a folder in it"):
        check_output(tmp_path / "volume")
    check_output(tmp_path / "volume" / "model")


def test_a_continued_export_keeps_only_finished_weights(tmp_path: Path) -> None:
    """The base may have lost other files since then; nobody would look at those that are left."""
    partial = tmp_path / ".model.partial"
    (partial / "original").mkdir(parents=True)
    for name, text in {
        LOCK: "key",
        "a.safetensors": "",
        "b.safetensors.part": "",
        "notes.txt": "",
        "original/x.py": "",
    }.items():
        (partial / name).write_text(text, encoding="utf-8")
    with finished_folder(tmp_path / "model", "key") as folder:
        assert sorted(path.name for path in folder.iterdir()) == [LOCK, "a.safetensors"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
def test_memory_is_one_matrix_not_a_model(tmp_path: Path) -> None:
    """A checkpoint of 64 MB: the export may take a shard and a matrix in float32; it takes less."""
    base, shard, matrix = save_large(tmp_path / "base")
    for name in ("warm", "real"):
        (tmp_path / name).mkdir()
    assert peak_of_a_merged_export(base, tmp_path) <= shard + matrix
