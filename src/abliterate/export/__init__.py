"""The exporters by kind. A new exporter is a file beside these and a line in `EXPORTERS`."""

from __future__ import annotations

from abliterate.export.adapter import Adapter
from abliterate.export.card import checked, model_card
from abliterate.export.folder import check_output, finished_folder, leave_record
from abliterate.export.job import Exporter, ExportJob
from abliterate.export.merged import Merged

EXPORTERS: dict[str, Exporter] = {exporter.kind: exporter for exporter in (Merged(), Adapter())}

__all__ = ["EXPORTERS", "ExportJob", "Exporter", "check_output", "checked", "finished_folder", "leave_record", "model_card"]
