"""The cache on disk: tensors, keyed by everything they depend on.

An entry is `<root>/<kind>/<sha256 of its key>.safetensors` with a sidecar `.json` (format, key, checksum, size, time).
The sidecar is written last, so an entry without a sidecar was never finished. Both are written under a temporary name and
renamed; two processes may share a store. Entries that are corrupt or not ours are reported and recomputed, never
trusted. `verify` and `clear` agree on the files that are ours: those by an entry's name, unless one of the pair can be read and
is somebody else's; and stale temporary files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from abliterate import ranks
from abliterate.files import expanded

FORMAT = 1
_ENTRY = re.compile(r"^[0-9a-f]{64}\.json$")
_TEMPORARY = re.compile(r"^[0-9a-f]{64}\.[0-9a-f]{32}\.abliterate-tmp$")
# Our data files begin with this mark, after the length of their header; it identifies them if the sidecar is lost or damaged.
_MARK = b'{"__metadata__":{"abliterate":'
_LARGEST_HEADER = 100_000_000  # the safetensors format has no larger one
# A temporary file that is older than this was left by a writer that died: a living one renames it much earlier.
_STALE_SECONDS = 24 * 3600.0


def default_root(cache_dir: str = "") -> Path:
    """`cache_dir` if it is given, else the user's cache directory."""
    return expanded(cache_dir) if cache_dir else Path(platformdirs.user_cache_dir("abliterate"))


@dataclass(frozen=True)
class Entry:
    """One finished entry, as its sidecar describes it."""

    kind: str
    digest: str
    key: Mapping[str, Any]
    label: str
    size: int
    checksum: str
    created: float
    data: Path
    sidecar: Path


_Memory = dict[tuple[str, str], dict[str, Tensor]]
_PROCESS: dict[str, _Memory] = {}
_MEMORY_LIMIT = 2**30  # bytes


class ArtifactStore:
    """Reads and writes entries; counts hits and misses per kind.

    `in_memory` also keeps tensors that are read or written, at most `memory_limit` bytes, so that later runs of this process
    skip the disk.
    """

    def __init__(
        self,
        root: Path,
        *,
        warn: Callable[[str], None],
        enabled: bool = True,
        in_memory: bool = False,
        memory_limit: int = _MEMORY_LIMIT,
    ) -> None:
        self.root = root
        self._memory_limit = memory_limit
        self._warn = warn
        self._enabled = enabled
        self._memory: _Memory | None = _PROCESS.setdefault(str(root.absolute()), {}) if in_memory else None
        self.hits: dict[str, int] = {}
        self.misses: dict[str, int] = {}

    def has(self, kind: str, key: Mapping[str, Any]) -> bool:
        """Whether there is an entry under `key`, which may still be corrupt. The query counts as neither hit nor miss."""
        digest = key_digest(key)
        # Not `Path.exists`, which is an error in a folder of another user's that may not be looked into.
        return (kind, digest) in (self._memory or {}) or (self._enabled and os.path.exists(self.root / kind / f"{digest}.json"))

    def get(self, kind: str, key: Mapping[str, Any], *, remember: bool = True) -> dict[str, Tensor] | None:
        """The tensors stored under `key`, or None if they are absent, disabled, or corrupt (which is a warning).

        `remember` off: tensors read from disk aren't kept in memory, even by a store with `in_memory`.
        """
        digest = key_digest(key)
        tensors = (self._memory or {}).get((kind, digest))
        if tensors is None and self._enabled:
            tensors = self._read(kind, digest)
        counts = self.misses if tensors is None else self.hits
        counts[kind] = counts.get(kind, 0) + 1
        if tensors is not None and remember:
            self._remember(kind, digest, tensors)
        return tensors

    def put(
        self, kind: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor], label: str = "", *, remember: bool = True
    ) -> None:
        """Store `tensors` under `key`; if the disk can't be written, warn and return.

        `label` describes the entry in `cache ls`; `remember` is as in `get`.
        """
        digest = key_digest(key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if remember:
            self._remember(kind, digest, plain)
        if not self._enabled:
            return
        payload = save(plain, metadata={"abliterate": str(FORMAT)})
        sidecar = {
            "format": FORMAT,
            "key": dict(key),
            "label": label,
            "size": len(payload),
            "sha256": hashlib.sha256(payload).hexdigest(),
            "created": time.time(),
        }
        try:
            folder = self.root / kind
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, digest, ".safetensors", payload)
            _write(folder, digest, ".json", json.dumps(sidecar, indent=1, sort_keys=True).encode())
        except OSError as error:
            self._warn(f"The cache at {self.root} can't be written ({error.strerror}); results stay in memory only.")

    def _remember(self, kind: str, digest: str, tensors: dict[str, Tensor]) -> None:
        if self._memory is None:
            return
        self._memory[(kind, digest)] = tensors
        limit = self._memory_limit
        while len(self._memory) > 1 and sum(t.nbytes for kept in self._memory.values() for t in kept.values()) > limit:
            del self._memory[next(iter(self._memory))]  # the oldest

    def counts(self, kind: str) -> dict[str, int]:
        """Hits and misses of one kind until now."""
        return {"hits": self.hits.get(kind, 0), "misses": self.misses.get(kind, 0)}

    def entries(self) -> Iterator[Entry]:
        """Every finished entry with a readable sidecar of our format, newest first."""
        entries = [_read_entry(path) for path in self.root.glob("*/*.json") if _ENTRY.match(path.name)]
        yield from sorted((entry for entry in entries if entry), key=lambda entry: -entry.created)

    def verify(self) -> Iterator[tuple[Path, str]]:
        """(file, fault) for every entry that would not be trusted; `clear` deletes the files of each."""
        for sidecar in sorted({path.with_suffix(".json") for path in self._ours()}):
            entry = _read_entry(sidecar)
            if entry is None:
                yield sidecar, _why_unusable(sidecar)
                continue
            try:
                load(_checked(entry))
            except (OSError, ValueError, SafetensorError) as error:
                yield entry.data, str(error)

    def clear(self, chosen: Callable[[Entry], bool] | None = None, leftovers: Iterable[Path] | None = None) -> tuple[int, int]:
        """Delete the `chosen` entries and the given `leftovers`; returns the number of (entries, bytes) deleted.

        By default all files of ours are deleted, and of chosen entries no leftovers, because nobody knows what they are of.
        """
        count = freed = 0
        for entry in list(self.entries()):
            if chosen and not chosen(entry):
                continue
            # Sidecar first: a reader must never find a sidecar that promises missing data.
            entry.sidecar.unlink(missing_ok=True)
            entry.data.unlink(missing_ok=True)
            count, freed = count + 1, freed + entry.size
        for path in leftovers if leftovers is not None else [] if chosen else self.leftovers():
            freed += path.stat().st_size
            path.unlink(missing_ok=True)
        return count, freed

    def leftovers(self) -> list[Path]:
        """Files of ours without a usable entry: stale temporary files, and entries that are damaged or of another version."""
        stale = [
            path
            for path in sorted(self.root.glob("*/*"))
            if _TEMPORARY.match(path.name) and time.time() - _modified(path) > _STALE_SECONDS
        ]
        return stale + [path for path in self._ours() if _read_entry(path.with_suffix(".json")) is None]

    def _ours(self) -> Iterator[Path]:
        """The files of entries, sound or damaged. One file of a pair may be missing or unreadable."""
        for path in sorted(self.root.glob("*/*")):
            sidecar, data = path.with_suffix(".json"), path.with_suffix(".safetensors")
            if path not in (sidecar, data) or not _ENTRY.match(sidecar.name) or not path.is_file():
                continue
            signs = (_is_our_sidecar(sidecar), _is_our_data(data))
            # What can't be read is damaged, since nobody else gives a file such a name in a folder like this.
            if True in signs or False not in signs:
                yield path

    def _read(self, kind: str, digest: str) -> dict[str, Tensor] | None:
        path = self.root / kind / f"{digest}.json"
        if not os.path.exists(path):
            return None
        entry = _read_entry(path)
        try:
            if entry is None:
                raise ValueError("its description is unreadable")
            return load(_checked(entry))
        except (OSError, ValueError, SafetensorError) as error:
            self._warn(f"The cache entry {path.stem[:12]} ({kind}) is not usable: {error}; it is computed again.")
            return None


class SharedStore(ArtifactStore):
    """The store of a run on several ranks: rank 0 reads and writes its files, and all get what it reads."""

    def has(self, kind: str, key: Mapping[str, Any]) -> bool:
        return ranks.agree(lambda: ArtifactStore.has(self, kind, key))

    def get(self, kind: str, key: Mapping[str, Any], *, remember: bool = True) -> dict[str, Tensor] | None:
        return ranks.agree(lambda: ArtifactStore.get(self, kind, key, remember=remember))

    def put(
        self, kind: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor], label: str = "", *, remember: bool = True
    ) -> None:
        if ranks.is_first():
            super().put(kind, key, tensors, label, remember=remember)


def key_digest(key: Mapping[str, Any]) -> str:
    """SHA-256 of the key's canonical JSON and the format version."""
    canonical = json.dumps({"format": FORMAT, "key": key}, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _checked(entry: Entry) -> bytes:
    payload = entry.data.read_bytes()
    if hashlib.sha256(payload).hexdigest() != entry.checksum:
        raise ValueError("its checksum differs from the one written")
    return payload


def _read_entry(sidecar: Path) -> Entry | None:
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        if record["format"] != FORMAT or key_digest(record["key"]) != sidecar.stem:
            return None
        return Entry(
            kind=sidecar.parent.name,
            digest=sidecar.stem,
            key=record["key"],
            label=str(record["label"]),
            size=int(record["size"]),
            checksum=str(record["sha256"]),
            created=float(record["created"]),
            data=sidecar.with_suffix(".safetensors"),
            sidecar=sidecar,
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _modified(path: Path) -> float:
    """The time of a file's last change; now, if it has gone since it was listed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _why_unusable(sidecar: Path) -> str:
    return "unreadable or of another format" if os.path.exists(sidecar) else "its description is missing"


def _is_our_data(data: Path) -> bool | None:
    """Whether a data file has our mark; None if it is missing or no safetensors file, so that nobody knows."""
    try:
        with data.open("rb") as file:
            size, start = file.read(8), file.read(len(_MARK))
            if start == _MARK:
                return True
            length = min(int.from_bytes(size, "little"), _LARGEST_HEADER)
            json.loads((start + file.read(max(0, length - len(start))))[:length])
    except (OSError, ValueError, RecursionError):
        return None
    return False


def _is_our_sidecar(sidecar: Path) -> bool | None:
    """Whether a sidecar has the fields of ours; None if it is missing or no JSON, so that nobody knows."""
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return isinstance(record, dict) and {"format", "key", "label", "sha256"} <= record.keys()


def _write(folder: Path, digest: str, suffix: str, content: bytes) -> None:
    temporary = folder / f"{digest}.{uuid.uuid4().hex}.abliterate-tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / (digest + suffix))
    finally:
        temporary.unlink(missing_ok=True)


def to_bytes(text: str) -> Tensor:
    """`text` as a tensor that an entry can store; the inverse of `from_bytes`."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8)


def from_bytes(tensor: Tensor) -> str:
    """The inverse of `to_bytes`."""
    return bytes(tensor.tolist()).decode("utf-8")
