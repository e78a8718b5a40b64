"""Export a trial of a run as GGUF, by editing a GGUF file of the run's model (`abliterate export RUN --trial N --gguf FILE`).

The edit is that of the trial's parameters and directions, applied by its definition to the matrices of the file, which are the
weights that the result runs with. Neither the run's prompts nor a loaded model is needed.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate._version import __version__
from abliterate.artifacts.result import ExportRecord, Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.edits import edit_method, needs_inputs
from abliterate.errors import AbliterateError
from abliterate.export.base_weights import targets_by_name
from abliterate.export.check_behaviour import Verification
from abliterate.export.check_weights import check_weights
from abliterate.export.folder import disk_sentence
from abliterate.export.gguf import (
    NAME,
    OURS,
    GgufMatrices,
    RereadGguf,
    check_columns,
    compare_with,
    edited_pieces,
    marked,
    planned_types,
    retyped,
)
from abliterate.export.gguf_file import Field, number_field, read_gguf, size_of, string_field, write_gguf
from abliterate.export.gguf_library import block_sizes, type_name, type_of
from abliterate.export.gguf_names import find_tensors
from abliterate.export.safetensors_copy import check_room
from abliterate.files import check_new_file
from abliterate.model import loader
from abliterate.model.checkpoint import dense_load, empty_model
from abliterate.pipeline.export_trial import StoredEdits, StoredTrial, edits_of, open_model, report_end, with_yardstick
from abliterate.settings.schema import Settings
from abliterate.types import Reporter, kl_text

# A larger share of a module's edit that storage loses is worth a warning: Q8_0 loses under 1 %, Q4_0 most (docs/decisions.md).
_LOSS = 0.1


@dataclass(frozen=True)
class GgufRequest:
    """What the command line asks for: the file to edit, the file to write, and a type for edited matrices ("": chosen)."""

    base: Path
    final: Path
    kind: str = ""


def export_gguf(settings: Settings, reporter: Reporter, directory: RunDirectory, number: int, request: GgufRequest) -> Result:
    """Write a copy of a GGUF file with one complete trial's edits; returns the run's result as if it had selected that trial.

    The file gets its name once it has been read back and compared with the edits' definition.

    Raises:
        InputError: the output exists, the file can't be read, isn't of the run's model or may have inputs in another order, or
            the model has changed.
        AbliterateError: the disk is full, or what was written differs from the trial.
    """
    check_new_file(request.final)  # since nothing shows that a file is an earlier export
    file = read_gguf(request.base, block_sizes())
    wanted = type_of(request.kind) if request.kind else None
    stored = StoredTrial.read(settings, reporter, directory, number)
    context, result = stored.context, stored.result
    base = _open_base(stored, file, request)
    stored.check(base.targets)
    edits = edits_of(context, base, stored.directions, stored.refined, stored.trial)
    if needs_inputs(edit_method(context.settings.edit.mode)):
        check_columns(base, edits.factors, context.settings.edit.mode)
    kinds = planned_types(base, edits.factors, wanted)
    _tell_types(reporter, base, kinds)
    with _finished_file(request.final) as partial:
        _write(stored, base, edits, kinds, partial)
        verdict = _check(stored, base, edits, kinds, partial)
        if not verdict.ok:
            raise AbliterateError(
                f"The file that was written differs from the trial ({_differences(verdict.record)}) and was removed; check the "
                "disk, and repeat the command or report this fault."
            )
    if verdict.record["lost_to_storage"] > _LOSS:
        reporter.warn(
            f"Rounding to the tensors' type loses {verdict.record['lost_to_storage']:.0%} of the edit of one module; "
            "--gguf-type Q8_0 or F16 keeps it."
        )
    result.export = _record(stored, base, kinds, request, verdict)
    report_end(context, result, request.final)
    return result


def _open_base(stored: StoredTrial, file: Any, request: GgufRequest) -> GgufMatrices:
    """The file's matrices for the modules of the run's model."""
    context, number = stored.context, stored.trial.number
    with context.stage("read the base", request.base.name):
        source, load, architecture = open_model(context.settings, stored.result, number)
        load = dense_load(load)
        config = loader.load_config(source, load)
        model = empty_model(config, load)
        targets = targets_by_name(model, architecture)
        base = GgufMatrices(file, targets, find_tensors(file, config, targets))
        reason = compare_with(base, source, load, config, model)
    if reason:
        context.reporter.note(
            f"names and shapes in {request.base.name} fit the run's model, and its weights weren't compared, because {reason}",
            reason=reason,
        )
    return base


def _tell_types(reporter: Reporter, base: GgufMatrices, kinds: Mapping[str, int]) -> None:
    """Say in which types the edited matrices are written."""
    changes = Counter((base.tensors[name].type, kind) for name, kind in kinds.items())
    for (old, new), count in sorted(changes.items()):
        kept = "as before" if old == new else f"instead of {type_name(old)}"
        reporter.note(f"{count} edited tensors are written as {type_name(new)}, {kept}", tensors=count, type=type_name(new))


def _write(stored: StoredTrial, base: GgufMatrices, edits: StoredEdits, kinds: Mapping[str, int], partial: Path) -> None:
    context = stored.context
    fields = marked(base.file.fields, _additions(stored, base))
    tensors = retyped(base, kinds)
    check_room(size_of(base.file, fields, tensors.values()), partial.parent)

    def progress(done: int) -> None:
        context.reporter.progress(done, len(kinds), "modules")

    with context.stage("export", "gguf", at_once=True):
        write_gguf(partial, base.file, fields, tensors, edited_pieces(base, edits.factors, kinds, progress))


def _check(
    stored: StoredTrial, base: GgufMatrices, edits: StoredEdits, kinds: Mapping[str, int], partial: Path
) -> Verification:
    """Read the file back: edited matrices against the definition, and everything else against the base's bytes."""
    context = stored.context

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "modules")

    with context.stage("check weights"):
        reread = RereadGguf(base, read_gguf(partial, block_sizes()), kinds)
        return with_yardstick(context.settings, check_weights(base, reread, edits.definitions, progress))


def _differences(record: Mapping[str, Any]) -> str:
    return ", ".join([*record["weight_error"]["off"], *record.get("differs", ())][:3])


def _additions(stored: StoredTrial, base: GgufMatrices) -> dict[str, Field]:
    """The entries of the metadata that say what was done; no local path is among them."""
    result, trial = stored.result, stored.trial
    baseline, model = result.baseline, result.model
    assert baseline is not None
    assert model is not None
    edit = stored.context.settings.edit
    name = base.file.value(NAME) or model.id
    texts = {
        NAME: f"{name} abliterated",
        f"{OURS}version": __version__,
        f"{OURS}base_model": model.id,
        f"{OURS}edit": f"directional ablation, mode {edit.mode}, representation {edit.representation}",
        f"{OURS}scores": f"refusals {baseline.refusals} -> {trial.refusals} of {baseline.prompts}, KL {kl_text(trial.kl)}, "
        "measured on the base model's own weights",
    }
    return {key: string_field(key, text) for key, text in texts.items()} | {
        f"{OURS}trial": number_field(f"{OURS}trial", trial.number)
    }


def _record(
    stored: StoredTrial, base: GgufMatrices, kinds: Mapping[str, int], request: GgufRequest, verdict: Verification
) -> ExportRecord:
    changes = sorted({(base.tensors[name].type, kind) for name, kind in kinds.items()})
    facts: dict[str, Any] = {
        "kind": "gguf",
        "trial": stored.trial.number,
        "path": request.final.name,
        "verified": verdict.ok,
        "pushed": None,
        "edited_modules": len(kinds),
        "tensor_types": [{"base": type_name(old), "export": type_name(new)} for old, new in changes],
        "bytes": request.final.stat().st_size,
        "verification": verdict.record,
    }
    return ExportRecord(**facts)


@contextlib.contextmanager
def _finished_file(final: Path) -> Iterator[Path]:
    """A hidden name beside `final` that becomes `final` on success; on failure its file is removed."""
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        check_new_file(final)  # again, because time has passed since the first check
        partial.rename(final)
    except OSError as error:
        raise AbliterateError(disk_sentence(final, error)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
