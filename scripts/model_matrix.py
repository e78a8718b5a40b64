"""Print the matrix of model families into docs/models.md: what is found, edited, evaluated and exported of each.

The models are the tiny ones of `tests/support/zoo.py`; `tests/families/test_families.py` checks the same, and more.
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
sys.path.insert(0, str(ROOT / "tests"))  # what follows is imported from there

# ruff: noqa: E402
import torch
import transformers

from abliterate.errors import AbliterateError
from abliterate.model.coverage import coverage_of
from support.models import save_model
from support.zoo import ZOO, Lab, export, make_lab

HEAD = """# Model families

By `python scripts/model_matrix.py`, with transformers {version}: tiny models built from config classes, {count} of them.
`tests/families/test_families.py` checks for each that the modules are those written down by hand, that each is proven to write
to the residual stream, that edited logits are those of a dense reference, and that the engine and both exports give the same.

- **found**: by the table of families, or by structure (a class that isn't in the table).
- **modules**: per component, edited modules in all layers (two to four), as *paths × layers*; a layer's fused experts are one.
- **coverage**: the share that is edited of all parameters of matrices that write to the residual stream (that these are
  all of them is measured, but for Gemma 3n, whose layers pass on several streams).
- **engine**: what trials leave out of the reference's work; *reference*: nothing, and the run says why.
- **merged**: whether an export streams the base's files, or loads and saves the model as a whole. **adapter**: whether PEFT
  can put one on this class (where not, that is said before a run).

| family | class | found | attn.o_proj | mlp.down_proj | coverage | engine | merged | adapter |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Examine every specimen and write the page."""
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
    """One line of the table."""
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
    """Paths of a component's modules within a layer, and how many layers have each."""
    stack = lab.loaded.targets[0].name.partition(".0.")[0]
    counts = Counter(
        target.name.removeprefix(f"{stack}.{target.layer}.") for target in lab.loaded.targets if target.component == component
    )
    return ", ".join(f"{path} × {count}" for path, count in counts.items()) or "–"


def exports(lab: Lab) -> tuple[str, str]:
    """How a merged export is written, and whether an adapter can be."""
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
