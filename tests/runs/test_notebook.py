"""The notebook of the documentation, docs/notebook.ipynb: executed by a kernel of its own, on few prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from support.paths import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
# Seconds for one cell on a busy machine; the slowest take a few.
PATIENCE = 300


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode, stream: str = "stdout") -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == stream)


@pytest.fixture(scope="module")
def executed(prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list, Path]]:
    """The notebook's code cells after they ran, and the folder they ran in. The environment gives them fewer prompts."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name, file in prompt_files.items():
            patch.setenv(f"ABLITERATE_PROMPTS__{name.upper()}", file)
        patch.setenv("ABLITERATE_EVALUATION__BATCH_SIZE", "12")
        patch.delenv("ABLITERATE_REFINE__ENABLED")
        patch.delenv("ABLITERATE_EDIT__MODE")
        # No start-up file and no kernel of the person who runs the test.
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / "jupyter"))
        notebook = read()
        # Sockets in a file system: other users of the machine can't connect to the kernel, as they can by TCP.
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=str(folder / "kernel.json"))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, km=kernel, timeout=PATIENCE, resources=resources).execute()
        yield code_cells(notebook), folder


def test_it_is_committed_without_outputs_and_counts() -> None:
    notebook = read()
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


def test_every_cell_runs(executed: tuple[list, Path]) -> None:
    cells, _ = executed
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_progress_is_shown_in_the_cells_that_work(executed: tuple[list, Path]) -> None:
    cells, _ = executed
    bars = {stage for cell in cells for stage in re.findall(r"(\w[\w ]*):\s+\d+%\|", printed(cell, "stderr"))}
    assert {"search", "refine", "verify"} <= bars  # a stage that takes no time may show none


def test_fewer_prompts_are_refused_after_the_edit(executed: tuple[list, Path]) -> None:
    cells, _ = executed
    (counts,) = [found for cell in cells if (found := re.search(r"(\d+) before, (\d+) after", printed(cell)))]
    before, after = int(counts[1]), int(counts[2])
    assert before >= 10  # of 12: the demo refuses nearly all of them
    assert after <= before / 2
    (answers,) = [printed(cell) for cell in cells if "after:" in printed(cell)]
    old, new = (re.findall(rf"{when}:\s+(.+)", answers) for when in ("before", "after"))
    assert "cannot" in old[0]
    assert "cannot" not in new[0]
    assert len(old) == len(new) == 3


def test_a_trial_is_refined_and_the_front_is_drawn(executed: tuple[list, Path]) -> None:
    cells, _ = executed
    (refined,) = [printed(cell) for cell in cells if "study.refine()" in cell.source]
    assert re.fullmatch(r"trial 10: \d+ of 12 unanswered, KL \d\.\d{5}\n", refined)
    pictures = [output.data.get("image/svg+xml") for cell in cells for output in cell.outputs if "data" in output]
    (picture,) = [picture for picture in pictures if picture]
    assert "selected" in picture  # the legend has the picked trial


def test_the_export_is_a_verified_model(executed: tuple[list, Path]) -> None:
    cells, folder = executed
    (said,) = [printed(cell) for cell in cells if "ab.export" in cell.source]
    assert "a merged model" in said
    assert said.endswith("verified after reloading: True\n")
    assert {"model.safetensors", "README.md"} <= {path.name for path in (folder / "demo-without-refusal").iterdir()}
