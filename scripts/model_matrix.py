"""Write the matrix of model families to docs/models.md: how each is found, edited, evaluated and exported.

The models are the tiny models of `tests/zoo.py`; `tests/test_models.py` checks the same and more.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the imports below come from there

# ruff: noqa: E402
import torch
import transformers
from conftest import save_model
from zoo import ZOO, Lab, export, make_lab

from abliterate.errors import AbliterateError
from abliterate.model.coverage import coverage_of

HEAD = """# Model families

Made by `python scripts/model_matrix.py` with transformers {version} from {count} tiny models, which are built from config
classes. `tests/test_models.py` checks for each model that the modules are those written down by hand, that every module is
proven to write to the residual stream, that edited logits are those of a dense reference, and that the engine and both exports
give the same.

- **found**: by the table of families, or by structure (for a class that isn't in the table).
- **modules**: the edited modules of each component in all layers (two to four), as *paths × layers*; the fused experts of a
  layer count as one module.
- **coverage**: the edited share of all parameters in matrices that write to the residual stream (a measurement proves that no
  such matrix is missing, except for Gemma 3n, whose layers pass on several streams).
- **engine**: the work of the reference that trials skip; *reference*: none, and the run reports the reason.
- **merged**: whether an export streams the base's files, or loads and saves the model as a whole. **adapter**: whether PEFT can
  put an adapter on this class (if not, a run reports it at its start).

| family | class | found | attn.o_proj | mlp.down_proj | coverage | engine | merged | adapter |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Examine every model and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "models.md")
    out: Path = parser.parse_args().out
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = [row_of(name) for name in ZOO]
    page = HEAD.format(version=transformers.__version__, count=len(rows)) + "\n".join(rows) + "\n"
    out.write_text(page, encoding="utf-8")
    print(page)


def row_of(name: str) -> str:
    """The table row of one model."""
    lab = make_lab(name)
    loaded = lab.loaded
    cells = [
        name,
        type(loaded.model).__name__,
        loaded.architecture.found_by,
        modules(lab, "attn.o_proj"),
        modules(lab, "mlp.down_proj"),
        f"{coverage_of(loaded.model, loaded.architecture, loaded.targets).share:.0%}",
        lab.mechanisms,
        *exports(lab),
    ]
    return f"| {' | '.join(cells)} |"


def modules(lab: Lab, component: str) -> str:
    """The paths of a component's modules within a layer, each with the number of layers that have it."""
    layers = lab.loaded.targets[0].name.partition(".0.")[0]
    counts = Counter(
        target.name.removeprefix(f"{layers}.{target.layer}.") for target in lab.loaded.targets if target.component == component
    )
    return ", ".join(f"{path} × {count}" for path, count in counts.items()) or "–"


def exports(lab: Lab) -> tuple[str, str]:
    """The way a merged export is written, and whether an adapter can be exported."""
    adapter = "no"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_model(lab.loaded.model, folder / "base")
        facts, _ = export(lab, "merged", base, folder / "merged")
        with contextlib.suppress(AbliterateError):
            export(lab, "adapter", base, folder / "adapter")
            adapter = "yes"
    return "streamed" if facts["streamed"] else "whole", adapter


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
