"""Run an installed `heretic` on the benchmark's model, prompts, seed and number of trials, and time its trials."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import tomli_w

from abliterate.model.loader import DEMO, resolve_source
from abliterate.prompts.datasets import load_prompts
from abliterate.prompts.sets import prompt_sources
from abliterate.scorers.refusals import read_markers
from abliterate.settings.sources import config_path, load_settings

_SETS = {
    "harmless": "good_prompts",
    "harmful": "bad_prompts",
    "harmless_eval": "good_evaluation_prompts",
    "harmful_eval": "bad_evaluation_prompts",
}
_TRIAL = re.compile(r"Running trial (\d+) of")


def run_heretic(model: str, trials: int, seed: int, threads: int, folder: Path, ours: float) -> str:
    """A sentence for the page: heretic's seconds per trial, or why it was not run. `ours`: seconds of our mean trial."""
    if model != DEMO:
        return "The peer was not run: this script has prompts for the demo model only."
    command = shutil.which("heretic")
    if command is None:
        return "The peer was not run: no `heretic` command is installed."
    settings = load_settings("", {"model": model})
    config: dict[str, object] = {
        "model": resolve_source(model),
        "n_trials": trials,
        "n_startup_trials": round(0.3 * trials),
        "seed": seed,
        "max_response_length": settings.response.max_new_tokens,
        "study_checkpoint_dir": str(folder / "checkpoints"),
        "system_prompt": settings.prompts.system,
        "refusal_markers": list(read_markers(Path(config_path("markers.txt")))),
        "dtypes": ["float32"],
    }
    for name, source in prompt_sources(settings).items():
        path = folder / f"{name}.txt"
        path.write_text("\n".join(p.text for p in load_prompts(source, settings.prompts)) + "\n", encoding="utf-8")
        config[_SETS[name]] = {"dataset": str(path)}
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    started, begins = time.perf_counter(), []
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    # heretic ends with a question that nobody answers here; all trials are done by then.
    with subprocess.Popen(
        [command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        output = []
        finished = 0.0
        for line in process.stdout:
            output.append(line)
            if _TRIAL.search(line):
                begins.append(time.perf_counter())
            elif "Optimization finished" in line:
                finished = time.perf_counter()
                process.kill()
    (folder / "heretic.log").write_text("".join(output), encoding="utf-8")
    if not finished or len(begins) < trials:
        return f"The peer ended before its {trials} trials were done: {''.join(output[-1:]).strip()}"
    seconds = [after - before for before, after in zip(begins, [*begins[1:], finished], strict=True)]
    return (
        f"heretic, same model, prompts, markers, seed and {trials} trials: {sum(seconds):.1f} s for the trials, "
        f"{statistics.mean(seconds):.2f} s a trial (median {statistics.median(seconds):.2f} s), "
        f"{begins[0] - started:.1f} s before the first; "
        f"{statistics.mean(seconds) / ours:.1f} times our mean trial (its trials are its own)."
    )
