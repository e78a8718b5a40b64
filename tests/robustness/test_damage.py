"""Damaged files of a run and of the cache: recovered, or refused in one sentence; never a wrong value, never a traceback."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load, save

from abliterate.artifacts.cache import ArtifactStore
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import app
from abliterate.errors import InputError
from abliterate.files import digest_of, write_json
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline import stages
from abliterate.search.space import Space
from abliterate.search.storage import CheckedJournal, check_journal, open_storage
from abliterate.search.study import open_study
from abliterate.settings.schema import SearchSettings, Settings
from abliterate.settings.sources import load_settings
from support.runs import Recorder, copy_run, outcomes, run_in, with_kind

pytestmark = pytest.mark.usefixtures("lean")
Finished = tuple[Path, dict[str, Any], Settings]
Damage = tuple[str, bytes]


def damages(content: bytes, seed: int, count: int) -> Iterator[Damage]:
    """(what, the content): cut off at the ends and at every kind of place, bits flipped, zeroed, put behind something else."""
    draw = random.Random(seed)
    made = []
    for at in (0, 1, len(content) // 2, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count))):
        made.append((f"cut at {at}", content[:at]))
    for _ in range(3 * count):
        at, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        made.append((f"bit {bit} of byte {at}", content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]))
    for _ in range(count):
        at = draw.randrange(len(content))
        made.append((f"zeros from {at}", content[:at] + bytes(min(64, len(content) - at)) + content[at + 64 :]))
    made += [("zeros at the end", content + bytes(4096)), ("another file", b"\x89PNG\r\n\x1a\n" + content)]
    return (one for one in made if one[1] != content)


def refusal(work: Callable[[], object]) -> tuple[object, str]:
    """(what it gives, "") or (None, the sentence it is refused with)."""
    try:
        return work(), ""
    except InputError as error:
        text = str(error)
    assert len(text.splitlines()) == 1, text
    return None, text


def trials_in(journal: Path) -> list[dict[str, Any]]:
    """Trials of a study as they come back from its journal."""
    space = Space(SearchSettings(), 12, ("attn.o_proj", "mlp.down_proj"))
    return [trial.to_record() for trial in open_study("", journal, space, 0).trials()]


def test_a_damaged_study_is_cut_back_or_refused(finished: Finished, tmp_path: Path) -> None:
    path, first, _ = finished
    content = (path / "study.journal").read_bytes()
    journal = tmp_path / "study.journal"
    refused = recovered = 0
    for what, damaged in damages(content, 0, 12):
        journal.write_bytes(damaged)
        found, why = refusal(lambda: trials_in(journal))
        if why:
            refused += 1
            assert "--restart" in why, what
            continue
        recovered += 1
        assert isinstance(found, list)
        assert found == first["trials"][: len(found)], what  # fewer, perhaps, but never others
    assert refused > 20
    assert recovered > 5


def test_every_flipped_byte_of_a_journals_line_is_seen(finished: Finished, tmp_path: Path) -> None:
    lines = (finished[0] / "study.journal").read_bytes().splitlines(keepends=True)
    line = max(lines, key=len)
    for at in random.Random(0).sample(range(len(line) - 1), 300):
        (tmp_path / "j").write_bytes(lines[0] + line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :])
        with pytest.raises(ValueError, match="line 2"):
            check_journal(tmp_path / "j")


def test_a_line_without_a_checksum_and_a_study_without_a_format_are_refused(finished: Finished, tmp_path: Path) -> None:
    lines = (finished[0] / "study.journal").read_text(encoding="utf-8").splitlines(keepends=True)
    record = json.loads(lines[-1])
    del record["sha256"]
    (tmp_path / "j").write_text("".join([*lines[:-1], json.dumps(record) + "\n"]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"line {len(lines)} is damaged"):
        check_journal(tmp_path / "j")
    run = copy_run(finished[0], tmp_path / "run")
    kept = [line for line in lines if '"format"' not in line]
    assert len(kept) < len(lines)
    (run / "study.journal").write_text("".join(kept), encoding="utf-8")
    with pytest.raises(InputError, match="The study has format None, this version reads format 1"):
        run_in(run, finished[2], resume=True)


def test_a_study_of_another_version_is_refused(finished: Finished, tmp_path: Path) -> None:
    path, _, settings = finished
    run = copy_run(path, tmp_path / "run")
    study = optuna.load_study(study_name=None, storage=open_storage("", run / "study.journal"))
    study.set_user_attr("format", 2)
    with pytest.raises(InputError, match=r"study has format 2.*--restart"):
        run_in(run, settings, resume=True)


@pytest.mark.parametrize("how", ["emptied", "gone", "last trials gone"])
def test_a_lost_study_is_refused_and_lost_trials_are_made_again(how: str, finished: Finished, tmp_path: Path) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    journal = run / "study.journal"
    if how == "last trials gone":
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[: 2 * len(lines) // 3]))
        result, recorder = run_in(run, with_kind(settings, "none"), resume=True)
        assert outcomes(result) == outcomes(first)
        assert any("are repeated" in warning for warning in recorder.warnings)
        return
    before = (run / "result.json").read_bytes()
    if how == "gone":
        journal.unlink()
        (run / "study.name").write_text("x", encoding="utf-8")  # still a run's directory
    else:
        journal.write_bytes(b"")
    for _ in range(2):  # nor does the second try find a new study
        with pytest.raises(InputError, match=r"study is gone.*--restart"):
            run_in(run, settings, resume=True)
    assert (run / "result.json").read_bytes() == before


def invoke(arguments: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and standard error of the command line."""
    monkeypatch.setattr(sys, "argv", ["abliterate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return int(ended.value.code or 0), " ".join(capsys.readouterr().err.split())


def test_a_damaged_result_is_never_shown_nor_exported(
    finished: Finished, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    content = (path / "result.json").read_bytes()
    for what, damaged in damages(content, 1, 15):
        (run / "result.json").write_bytes(damaged)
        found, why = refusal(lambda: Result.read(RunDirectory(run)).to_record())
        if why:
            assert "result.json" in why, what
            continue
        assert found == {name: value for name, value in first.items() if name != "sha256"}, what
    (run / "result.json").write_bytes(content.replace(b'"refusals": ', b'"refusals": 1', 1))
    for command in (["trials"], ["report"], ["export", "--trial", first["selected"], "-o", tmp_path / "out"]):
        code, err = invoke([command[0], run, *command[1:]], capsys, monkeypatch)
        assert (code, "damaged" in err, f"--resume --out {run} rebuilds it" in err) == (2, True, True), err
    assert outcomes(run_in(run, settings, resume=True)[0]) == outcomes(first)  # and it does
    pipeline_export_trial.export_trial(settings, Recorder(), RunDirectory(run), first["selected"], tmp_path / "out")


def test_results_of_other_versions_are_refused(finished: Finished, tmp_path: Path) -> None:
    """Not rebuilt either: a newer one may hold what this version can't."""
    path, first, settings = finished
    run = copy_run(path, tmp_path / "run")
    newer = {**first, "format": 2}
    write_json(run / "result.json", newer | {"sha256": digest_of(newer)})
    before = (run / "result.json").read_bytes()
    with pytest.raises(InputError, match="format 2, this version reads format 1"):
        run_in(run, settings, resume=True)
    assert (run / "result.json").read_bytes() == before


def test_damaged_settings_are_refused_or_change_nothing_of_a_trial(
    finished: Finished, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ABLITERATE_EDIT__MODE")  # it would win over the run's settings
    path, first, _ = finished
    run = copy_run(path, tmp_path / "run")
    content = (path / "settings.toml").read_bytes()
    refused = 0
    for _, damaged in damages(content, 2, 15):
        (run / "settings.toml").write_bytes(damaged)
        refused += bool(refusal(lambda: load_settings("", {}, stored=run / "settings.toml"))[1])
    assert refused > 15
    # One that still parses: what it changes is named, where a trial would mean something else.
    for old, new, words in ((b"seed = 0", b"seed = 8", "another seed"), (b'mode = "full"', b'mode = "pull"', "'pull'")):
        assert old in content
        (run / "settings.toml").write_bytes(content.replace(old, new))
        code, err = invoke(["run", "--resume", "-o", run], capsys, monkeypatch)
        assert (code, words in err) == (2, True), err
    (run / "settings.toml").write_bytes(b"\0" * 100)
    for command in (["run", "--resume", "-o", run], ["export", run, "--trial", first["selected"], "-o", tmp_path / "out"]):
        code, err = invoke(command, capsys, monkeypatch)
        assert (code, "settings.toml" in err) == (2, True), err


def test_damaged_directions_are_refused(finished: Finished, tmp_path: Path) -> None:
    path = finished[0]
    result = Result.read(RunDirectory(path))
    content = (path / "directions.safetensors").read_bytes()
    for what, damaged in damages(content, 3, 10):
        (tmp_path / "d").write_bytes(damaged)
        why = refusal(lambda: stages.read_directions(tmp_path / "d", result))[1]
        assert f"--resume --out {tmp_path} computes them again" in why, what
    newer = save(load(content), metadata={"format": "2"})
    (tmp_path / "d").write_bytes(newer)
    assert result.directions is not None
    known = result.directions.model_copy(update={"sha256": hashlib.sha256(newer).hexdigest()})
    with pytest.raises(InputError, match="--resume"):
        stages.read_directions(tmp_path / "d", result.model_copy(update={"directions": known}))


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"abliterate-x-123\n", b"abliterate-a b-0123456789ab", b"../x"])
def test_a_damaged_study_name_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.name").write_bytes(content)
    with pytest.raises(InputError, match=r"study\.name.*--restart"):
        RunDirectory(tmp_path).study_name()


def test_a_changed_study_name_is_another_study_and_refused(finished: Finished, tmp_path: Path) -> None:
    path, _, settings = finished
    run = copy_run(path, tmp_path / "run")
    own = settings.model_copy(
        update={"search": settings.search.model_copy(update={"storage": f"sqlite:///{tmp_path / 'study.db'}"})}
    )
    (run / "study.journal").unlink()
    (run / "study.name").write_text("abliterate-run-0123456789ab\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"study is gone.*study\.name"):
        run_in(run, own, resume=True)


def test_damaged_cache_entries_are_computed_again(tmp_path: Path) -> None:
    key = {"model": "m", "prompts": ["a", "b"]}
    tensors = {"r": torch.arange(200.0).reshape(20, 10), "h": torch.ones(3, dtype=torch.bfloat16)}
    ArtifactStore(tmp_path, warn=print).put("residuals", key, tensors, "m")
    files = {path: path.read_bytes() for path in (tmp_path / "residuals").iterdir()}
    for path, content in files.items():
        for what, damaged in damages(content, 4, 25):
            path.write_bytes(damaged)
            warnings: list[str] = []
            found = ArtifactStore(tmp_path, warn=warnings.append).get("residuals", key)
            if found is None:
                assert len(warnings) == 1, what
                assert "computed again" in warnings[0], what
            else:  # in what a sidecar says of its age, say
                assert path.suffix == ".json", what
                assert all(torch.equal(found[name], tensors[name]) for name in tensors), what
        path.write_bytes(content)


def test_cache_entries_of_other_versions_are_computed_again(tmp_path: Path) -> None:
    key: dict[str, Any] = {"model": "m"}
    ArtifactStore(tmp_path, warn=print).put("residuals", key, {"r": torch.ones(2)})
    sidecar = next((tmp_path / "residuals").glob("*.json"))
    for version in (0, 2, "1", None):
        sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"format": version}), encoding="utf-8")
        assert ArtifactStore(tmp_path, warn=lambda text: None).get("residuals", key) is None


def test_a_run_with_a_damaged_cache_is_the_same_run(finished: Finished, tmp_path: Path) -> None:
    _, first, settings = finished
    cache = copy_run(Path(settings.cache_dir), tmp_path / "cache")
    draw = random.Random(5)
    for path in sorted(cache.glob("*/*")):
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 0x55
        path.write_bytes(content)
    search = settings.search.model_copy(update={"trials": 2})
    own = with_kind(settings, "none").model_copy(update={"cache_dir": str(cache), "search": search})
    result, recorder = run_in(tmp_path / "run", own)
    assert outcomes(result) == outcomes(first)[:2]
    assert any("computed again" in warning for warning in recorder.warnings)


def test_a_half_written_record_is_cut_off_at_once(tmp_path: Path) -> None:
    """A full disk under a run that then writes less, as when it marks the trial as interrupted."""
    resource = pytest.importorskip("resource")
    journal = CheckedJournal(tmp_path / "study.journal")
    journal.append_logs([{"first": 1}])
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.append_logs([{"long": "x" * 1000}])
        journal.append_logs([{"short": 1}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    check_journal(tmp_path / "study.journal")
    assert [next(iter(record)) for record in CheckedJournal(tmp_path / "study.journal").read_logs(0)] == ["first", "short"]


def test_directions_are_the_same_bytes_at_each_run(finished: Finished) -> None:
    """safetensors writes several metadata entries in random order."""
    content = (finished[0] / "directions.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "1"}
