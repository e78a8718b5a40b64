"""Run an installed `heretic` on a model, its prompts, a seed and a number of trials, and read its trials off its output.

    python scripts/peer.py FOLDER --trials 40 --threads 2 --out FILE

FOLDER is `demo` or a model with `prompts/` (`real_model.py`). The command `heretic` may lie in an environment of its own; put
its folder on the PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from rig import settings_of

from abliterate.model.loader import resolve_source
from abliterate.prompts.datasets import load_prompts
from abliterate.prompts.sets import prompt_sources
from abliterate.scorers.refusals import read_markers
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path

_SETS = {
    "harmless": "good_prompts",
    "harmful": "bad_prompts",
    "harmless_eval": "good_evaluation_prompts",
    "harmful_eval": "bad_evaluation_prompts",
}
_TRIAL = re.compile(r"Running trial (\d+) of")
_KL, _REFUSALS = re.compile(r"KL divergence: ([0-9.]+)"), re.compile(r"\* Refusals: (\d+)/")


@dataclass
class Peer:
    """What a run of heretic told: for each trial (refusals, KL), and when it ended, in seconds from the start."""

    trials: list[tuple[int, float]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    before: float = 0.0  # seconds to the first trial

    @property
    def seconds(self) -> list[float]:
        """The seconds of each trial."""
        return [end - begin for begin, end in zip([self.before, *self.ends], self.ends, strict=False)]


def run_heretic(settings: Settings, trials: int, threads: int, folder: Path) -> Peer | str:
    """Run it with the model, prompts and seed of `settings` in an empty `folder`; a sentence if that isn't possible."""
    command = shutil.which("heretic")
    if command is None:
        return "The peer was not run: no `heretic` command is installed."
    _write_config(settings, trials, folder)
    started, peer, line = time.perf_counter(), Peer(), ""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    kl = 0.0
    # heretic ends with a question that nobody answers here; all trials are done by then.
    with (
        (folder / "heretic.log").open("w", encoding="utf-8", buffering=1) as log,
        subprocess.Popen(
            [command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if _TRIAL.search(line) and not peer.before:
                peer.before = time.perf_counter() - started
            elif peer.before and (found := _KL.search(line)):
                kl = float(found[1])
            elif peer.before and (found := _REFUSALS.search(line)):
                peer.trials.append((int(found[1]), kl))
                peer.ends.append(time.perf_counter() - started)
                if len(peer.trials) == trials:
                    process.kill()
    if len(peer.trials) < trials:
        return f"The peer ended before its {trials} trials were done: {line.strip()}"
    return peer


def sentence(peer: Peer | str, ours: float) -> str:
    """What a page says of it; `ours`: seconds of our mean trial."""
    if isinstance(peer, str):
        return peer
    seconds = peer.seconds
    return (
        f"heretic, same model, prompts, markers, seed and {len(seconds)} trials: {sum(seconds):.1f} s for the trials, "
        f"{statistics.mean(seconds):.2f} s a trial (median {statistics.median(seconds):.2f} s), "
        f"{peer.before:.1f} s before the first; "
        f"{statistics.mean(seconds) / ours:.1f} times our mean trial (its trials are its own)."
    )


def _write_config(settings: Settings, trials: int, folder: Path) -> None:
    config: dict[str, object] = {
        "model": resolve_source(settings.model),
        "n_trials": trials,
        "n_startup_trials": round(0.3 * trials),
        "seed": settings.seed,
        "max_response_length": settings.response.max_new_tokens,
        "study_checkpoint_dir": str(folder / "checkpoints"),
        "system_prompt": settings.prompts.system,
        "refusal_markers": list(read_markers(Path(config_path("markers.txt")))),
        # One that was asked for, as on a GPU; the default is float32 on CPUs.
        "dtypes": list(settings.load.dtypes) if len(settings.load.dtypes) == 1 else ["float32"],
    }
    for name, source in prompt_sources(settings).items():
        path = folder / f"{name}.txt"
        path.write_text("\n".join(p.text for p in load_prompts(source, settings.prompts)) + "\n", encoding="utf-8")
        config[_SETS[name]] = {"dataset": str(path)}
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")


def main() -> None:
    """Run it on a model and add a line to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="file to which a line is added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        peer = run_heretic(settings_of(args.model, args.seed), args.trials, args.threads, Path(folder))
        if isinstance(peer, str):
            raise SystemExit(peer + "\n" + (Path(folder) / "heretic.log").read_text(encoding="utf-8")[-2000:])
    line = {"model": Path(args.model).name, "seed": args.seed, "threads": args.threads, "before": peer.before}
    line |= {"trials": [[*trial, round(end, 2)] for trial, end in zip(peer.trials, peer.ends, strict=True)]}
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{statistics.mean(peer.seconds):.2f} s a trial, {peer.before:.0f} s before the first; (refusals, KL): {peer.trials}")


if __name__ == "__main__":
    main()
