"""The exporters by kind. A new exporter is a file beside these and a line in `EXPORTERS`, or a plugin's `exporters`."""

from __future__ import annotations

from abliterate.export.adapter import Adapter
from abliterate.export.card import checked, model_card
from abliterate.export.folder import check_output, finished_folder, leave_record
from abliterate.export.job import Exporter, ExportJob
from abliterate.export.merged import Merged
from abliterate.plugins import Registry

# The setting `export.kind` when nothing is to be exported.
NOTHING = "none"
EXPORTERS: Registry[Exporter] = Registry(
    "exporters",
    "export kind",
    {exporter.kind: exporter for exporter in (Merged(), Adapter())},
    named="kind",
    needs=("kind", "write", "load", "reread"),
    reserved=(NOTHING,),
)


def check_kind(kind: str) -> None:
    """InputError where a setting `export.kind` is neither an exporter's nor "none"."""
    if kind != NOTHING:
        EXPORTERS.find(kind)


def stores_weights(kind: str) -> bool:
    """Whether an export of that kind has the edited weights themselves, rounded to the dtype of the base's files."""
    return kind != NOTHING and bool(getattr(EXPORTERS[kind], "stores_weights", True))


__all__ = [
    "EXPORTERS",
    "ExportJob",
    "Exporter",
    "check_kind",
    "check_output",
    "checked",
    "finished_folder",
    "leave_record",
    "model_card",
    "stores_weights",
]
