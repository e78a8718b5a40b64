"""Count what a trial hands to the device, and how often it waits for it. Writes the table of docs/performance.md.

    python scripts/count_launches.py demo ~/.cache/abliterate-models/smollm2-refusing

On a GPU every operation is a kernel's launch of some microseconds, and every value that is read back stalls Python. Both are
counted on a CPU, over one surviving trial of each model without the drafts of earlier trials: what the model's own forward
pass calls, what the edits add, and what the engine adds beside. A last trial is counted with drafts. The edits are the default
and `full`, in which rows are scaled, too.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the counters come from there

# ruff: noqa: E402
import torch
from profile_trial import strong
from rig import make_rig, settings_of

from abliterate.search.pruner import DominancePruner
from support.launches import Launches
from support.waits import Waits

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- launches -->", "<!-- /launches -->"
# What reads only tensors in main memory, whatever the device: the directions.
HOST = ("base.py: blend",)
HEAD = (
    "| model | edit | drafts | passes | the model's own, a pass | of the edits, a pass and module | of the engine, a pass "
    "| waits, a pass | factors, a trial and module |"
)


def counted(model: str, mode: str, *, drafts: bool) -> str:
    """The table's row of a model."""
    with tempfile.TemporaryDirectory() as cache:
        options = [f"cache_dir={cache}", f"efficiency.use_drafts={str(drafts).lower()}", "evaluation.batch_size=100"]
        options.append(f"edit.mode={mode}")
        rig = make_rig(settings_of(model, 0, options))
        editor, never, edit = rig.bench.editor, DominancePruner.never(rig.bench.objectives), strong(rig, 0.01)
        rig.evaluate(0, strong(rig, 0.0), never)
        with Launches() as of_factors:
            editor.apply(edit)
        modules, before = len(editor.hooks.active), rig.counters.passes
        with Waits() as waits, Launches() as launches:
            trial = rig.evaluate(1, edit, never)
        assert trial.state == "complete"
        passes = rig.counters.passes - before
    edits = sum(count for place, count in launches.own.items() if place.startswith("edit_hooks.py"))
    own_waits = sum(count for place, count in waits.places.items() if place not in ("model", *HOST))
    cells: Sequence[Any] = (
        Path(model).name,
        f"`{mode}`",
        "on" if drafts else "off",
        passes,
        round(launches.places["model"] / passes),
        f"{edits / passes / modules:.2f}",
        f"{(launches.own.total() - edits) / passes:.1f}",
        f"{own_waits / passes:.2f}",
        round(of_factors.own.total() / modules),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    """Count for every model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["demo"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python scripts/count_launches.py {' '.join(args.models)}".replace(str(Path.home()), "~")
    lines = [f"{datetime.date.today()}, `{command}`:", "", HEAD, "|---|" + "---|" * (HEAD.count("|") - 2)]
    for model in args.models:
        for mode, drafts in itertools.product(("least-squares", "full"), (False, True)):
            lines.append(counted(model, mode, drafts=drafts))
            print(lines[-1], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
