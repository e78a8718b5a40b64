"""The artifact store: what comes back is what was put, or nothing; and nothing of others is touched."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from abliterate.artifacts.cache import ArtifactStore, default_root, key_digest

KEY = {"model": "m", "prompts": ["a", "b"], "dtype": "float32"}


def make_store(root: Path, **options: Any) -> tuple[ArtifactStore, list[str]]:
    warnings: list[str] = []
    return ArtifactStore(root, warn=warnings.append, **options), warnings


def tensors() -> dict[str, Tensor]:
    return {"r": torch.arange(12.0).reshape(3, 4), "h": torch.ones(2, dtype=torch.bfloat16)}


def same(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> bool:
    return found is not None and found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    make_store(tmp_path)[0].put("residuals", KEY, tensors(), label="m")
    return tmp_path


def sidecar(root: Path) -> Path:
    return root / "residuals" / f"{key_digest(KEY)}.json"


def test_round_trip_in_another_process_worth_of_store(filled: Path) -> None:
    store, warnings = make_store(filled)
    assert same(store.get("residuals", KEY), tensors())
    assert store.counts("residuals") == {"hits": 1, "misses": 0}
    assert warnings == []


def test_absent_is_a_miss_without_a_warning(filled: Path) -> None:
    store, warnings = make_store(filled)
    assert store.get("residuals", KEY | {"dtype": "bfloat16"}) is None
    assert store.get("directions", KEY) is None
    assert store.counts("residuals") == {"hits": 0, "misses": 1}
    assert warnings == []


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"prompts": ["ab"]}, {"prompts": ["b", "a"]}, {"dtype": "auto"}, {"new": None}, {"model": "m "}]
)
def test_every_difference_makes_another_key(change: dict[str, object]) -> None:
    assert key_digest(KEY | change) != key_digest(KEY)


def test_a_folder_that_may_not_be_looked_into_is_just_empty(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 has `Path.exists` raise an error there, as in a cache that users share."""

    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    store, warnings = make_store(filled)
    assert not store.has("residuals", KEY)
    assert store.get("residuals", KEY) is None
    assert warnings == []


def test_key_order_makes_no_difference() -> None:
    assert key_digest(dict(reversed(KEY.items()))) == key_digest(KEY)


def test_a_key_that_isnt_json_is_an_error() -> None:
    with pytest.raises(ValueError):
        key_digest({"x": float("nan")})


def test_views_and_gradients_can_be_stored(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    odd = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    store.put("residuals", KEY, {"x": odd})
    assert same(store.get("residuals", KEY), {"x": odd.detach().contiguous()})


def spoil_data(root: Path) -> None:
    path = sidecar(root).with_suffix(".safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def cut_data(root: Path) -> None:
    path = sidecar(root).with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:20])


def remove_data(root: Path) -> None:
    sidecar(root).with_suffix(".safetensors").unlink()


def cut_sidecar(root: Path) -> None:
    sidecar(root).write_bytes(sidecar(root).read_bytes()[:-30])


def binary_sidecar(root: Path) -> None:
    sidecar(root).write_bytes(b"\xff\xfe\x00\x01")


def foreign_sidecar(root: Path) -> None:
    sidecar(root).write_text('["not", "ours"]')


def rewrite(root: Path, **change: object) -> None:
    sidecar(root).write_text(json.dumps(json.loads(sidecar(root).read_text()) | change))


def other_format(root: Path) -> None:
    rewrite(root, format=999)


def other_key(root: Path) -> None:
    rewrite(root, key={"model": "another"})


def no_checksum(root: Path) -> None:
    record = json.loads(sidecar(root).read_text())
    del record["sha256"]
    sidecar(root).write_text(json.dumps(record))


def data_not_safetensors(root: Path) -> None:
    import hashlib

    sidecar(root).with_suffix(".safetensors").write_bytes(b"junk")
    rewrite(root, sha256=hashlib.sha256(b"junk").hexdigest())


SPOILERS = [
    spoil_data, cut_data, remove_data, cut_sidecar, binary_sidecar, foreign_sidecar, other_format, other_key, no_checksum,
    data_not_safetensors,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_a_spoilt_entry_is_a_warning_and_computed_again(filled: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    spoil(filled)
    store, warnings = make_store(filled)
    assert store.get("residuals", KEY) is None
    assert len(warnings) == 1
    assert "computed again" in warnings[0]
    store.put("residuals", KEY, tensors())
    assert same(make_store(filled)[0].get("residuals", KEY), tensors())


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_verify_names_a_spoilt_entry(filled: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    assert list(make_store(filled)[0].verify()) == []
    spoil(filled)
    found = list(make_store(filled)[0].verify())
    assert [path.stem for path, _ in found] == [key_digest(KEY)]


def test_an_unfinished_entry_is_just_absent(filled: Path) -> None:
    sidecar(filled).unlink()
    store, warnings = make_store(filled)
    assert store.get("residuals", KEY) is None
    assert warnings == []


def test_entries_say_what_they_are_of(filled: Path) -> None:
    store, _ = make_store(filled)
    store.put("residuals", {"model": "second"}, {"x": torch.zeros(1)}, label="newer")
    newer, older = store.entries()
    assert (newer.label, older.label, older.kind, dict(older.key)) == ("newer", "m", "residuals", KEY)
    assert older.size == older.data.stat().st_size
    assert abs(older.created - time.time()) < 60


def snapshot(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def foreign_files(root: Path) -> set[str]:
    """What others might keep there: none of it may be deleted."""
    digest = "0" * 64
    names = [
        "notes.txt", "residuals/notes.json", "residuals/model.safetensors", f"residuals/{digest}.json",
        f"residuals/{digest}.safetensors", "residuals/x.abliterate-tmp", f"{digest}.json", f"residuals/deeper/{digest}.json",
    ]  # fmt: skip
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
        os.utime(root / name, (0, 0))
    return set(names)


def test_clear_deletes_only_its_own_files(filled: Path) -> None:
    foreign = foreign_files(filled)
    store, _ = make_store(filled)
    size = sidecar(filled).with_suffix(".safetensors").stat().st_size
    assert store.clear() == (1, size)
    assert snapshot(filled) == foreign
    assert store.clear() == (0, 0)


def test_clear_filters(filled: Path) -> None:
    store, _ = make_store(filled)
    store.put("residuals", {"model": "second"}, {"x": torch.zeros(1)}, label="n")
    assert store.clear(lambda entry: entry.label == "n")[0] == 1
    assert [entry.label for entry in store.entries()] == ["m"]


def test_clear_of_a_directory_that_isnt_there(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "none")
    assert store.clear() == (0, 0)
    assert not (tmp_path / "none").exists()


def test_temporary_files(filled: Path) -> None:
    stale = filled / "residuals" / f"{'a' * 64}.{'b' * 32}.abliterate-tmp"
    fresh = filled / "residuals" / f"{'c' * 64}.{'d' * 32}.abliterate-tmp"
    for path in (stale, fresh):
        path.write_bytes(b"partial")
    os.utime(stale, (0, 0))
    store, warnings = make_store(filled)
    assert len(list(store.entries())) == 1
    store.clear()
    assert (stale.exists(), fresh.exists()) == (False, True)
    assert warnings == []


@pytest.mark.parametrize("damage", ["no sidecar", "no data", "sidecar cut", "another format", "nothing but a cut sidecar"])
def test_unusable_entries_of_ours_are_cleared(filled: Path, damage: str) -> None:
    description = sidecar(filled)
    if damage == "no sidecar":
        description.unlink()
    if damage in ("no data", "nothing but a cut sidecar"):
        description.with_suffix(".safetensors").unlink()
    if "cut" in damage:
        description.write_text(description.read_text()[:-9])
    if damage == "another format":
        description.write_text(description.read_text().replace('"format": 1', '"format": 2'))
    foreign = foreign_files(filled)
    store, _ = make_store(filled)
    store.clear(lambda entry: False)  # a filter spares them: nobody knows what they are of
    assert len(snapshot(filled)) > len(foreign)
    store.clear()
    assert snapshot(filled) == foreign


def empty_both(root: Path) -> None:
    sidecar(root).write_bytes(b"")
    sidecar(root).with_suffix(".safetensors").write_bytes(b"")


def cut_both(root: Path) -> None:
    cut_sidecar(root)
    cut_data(root)


def zero_both(root: Path) -> None:
    """What a crash of the machine leaves of files that were never flushed."""
    for path in (sidecar(root), sidecar(root).with_suffix(".safetensors")):
        path.write_bytes(b"\0" * path.stat().st_size)


def remove_sidecar(root: Path) -> None:
    sidecar(root).unlink()


def data_alone_and_empty(root: Path) -> None:
    empty_both(root)
    remove_sidecar(root)


def endless_numbers(root: Path) -> None:
    sidecar(root).write_text(sidecar(root).read_text().replace('"size": ', '"size": 1e999, "was": '))


def deep_sidecar(root: Path) -> None:
    sidecar(root).write_text("[" * 100_000)


@pytest.mark.parametrize(
    "spoil",
    [
        *SPOILERS,
        *(empty_both, cut_both, zero_both, remove_sidecar, data_alone_and_empty, endless_numbers, deep_sidecar),
    ],
    ids=lambda f: f.__name__,
)
def test_verify_and_clear_agree(filled: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    """What one calls unusable the other deletes, and neither says anything of other people's files."""
    foreign = foreign_files(filled)
    store, warnings = make_store(filled)
    assert list(store.verify()) == store.leftovers() == []
    spoil(filled)
    assert [(path.stem, path.parent.name) for path, _ in store.verify()] == [(key_digest(KEY), "residuals")]
    store.clear()
    assert list(store.verify()) == []
    assert snapshot(filled) == foreign
    assert warnings == []


def test_somebody_elses_files_of_such_a_name_are_no_entries(filled: Path) -> None:
    name = filled / "residuals" / ("1" * 64)
    name.with_suffix(".json").write_text('{"format": 1, "key": {}}')
    name.with_suffix(".safetensors").write_bytes(save({"x": torch.ones(1)}))
    (filled / "residuals" / ("2" * 64)).with_suffix(".json").mkdir()
    (filled / "residuals" / ("3" * 64)).with_suffix(".safetensors").write_bytes(save({"x": torch.ones(1)}, {"by": "others"}))
    store, _ = make_store(filled)
    before = snapshot(filled)
    assert list(store.verify()) == store.leftovers() == []
    assert store.clear()[0] == 1
    assert len(snapshot(filled)) == len(before) - 2


def test_writing_leaves_no_temporary_file(filled: Path) -> None:
    assert {Path(name).suffix for name in snapshot(filled)} == {".json", ".safetensors"}


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    store, warnings = make_store(tmp_path)
    store.put("residuals", KEY, tensors())
    assert "No space left" in warnings[0]
    assert snapshot(tmp_path) == set()
    assert store.get("residuals", KEY) is None


def test_two_stores_share_a_directory(tmp_path: Path) -> None:
    (first, _), (second, warnings) = make_store(tmp_path), make_store(tmp_path)
    first.put("residuals", KEY, tensors())
    assert same(second.get("residuals", KEY), tensors())
    second.put("residuals", KEY, tensors())
    assert same(first.get("residuals", KEY), tensors())
    assert len(list(first.entries())) == 1
    first.clear()
    assert second.get("residuals", KEY) is None
    assert warnings == []


def test_disabled_writes_and_reads_nothing(filled: Path) -> None:
    store, _ = make_store(filled, enabled=False)
    before = snapshot(filled)
    store.put("residuals", {"model": "n"}, tensors())
    assert store.get("residuals", KEY) is None
    assert snapshot(filled) == before


def test_in_memory_reads_the_disk_once(filled: Path) -> None:
    store, _ = make_store(filled, in_memory=True)
    assert same(store.get("residuals", KEY), tensors())
    make_store(filled)[0].clear()
    assert same(store.get("residuals", KEY), tensors())
    assert store.counts("residuals") == {"hits": 2, "misses": 0}
    # Another run of this process; and one that reads the disk.
    assert same(make_store(filled, in_memory=True)[0].get("residuals", KEY), tensors())
    assert make_store(filled)[0].get("residuals", KEY) is None


def test_memory_has_an_end(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, enabled=False, in_memory=True, memory_limit=100)
    for number in range(3):
        store.put("residuals", {"k": number}, {"t": torch.zeros(10)})
    assert [store.get("residuals", {"k": number}) is not None for number in range(3)] == [False, True, True]


def test_in_memory_alone(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "none", enabled=False, in_memory=True)
    store.put("residuals", KEY, tensors())
    assert same(store.get("residuals", KEY), tensors())
    assert not (tmp_path / "none").exists()


def test_what_memory_gives_doesnt_follow_later_changes_of_the_callers_dictionary(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, in_memory=True)
    mine = tensors()
    store.put("residuals", KEY, mine)
    mine.clear()
    assert same(store.get("residuals", KEY), tensors())


def test_an_unwritable_place_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")  # also stops root, whom permissions don't
    store, warnings = make_store(tmp_path / "file", in_memory=True)
    store.put("residuals", KEY, tensors())
    assert len(warnings) == 1
    assert "can't be written" in warnings[0]
    assert same(store.get("residuals", KEY), tensors())


def test_an_entry_under_anothers_name_is_not_trusted(filled: Path) -> None:
    """A renamed entry's key doesn't hash to its name."""
    other = {"model": "other"}
    for suffix in (".json", ".safetensors"):
        sidecar(filled).with_suffix(suffix).rename(filled / "residuals" / (key_digest(other) + suffix))
    store, warnings = make_store(filled)
    assert store.get("residuals", other) is None
    assert len(warnings) == 1


def test_data_of_another_entry_is_not_trusted(filled: Path) -> None:
    sidecar(filled).with_suffix(".safetensors").write_bytes(save({"r": torch.zeros(3, 4)}))
    assert make_store(filled)[0].get("residuals", KEY) is None


def test_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root("~/x") == tmp_path / "x"
    assert default_root().name == "abliterate"
