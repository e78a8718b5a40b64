"""Made-up trials and run directories for reports."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.evaluation.heldout import rate
from abliterate.files import write_json
from abliterate.objectives import DEFAULT, to_records
from abliterate.report import draw
from abliterate.search.front import pareto_front
from abliterate.types import Baseline, Kernel, Trial, TrialParams
from support.refined import refined_trial

DRAWN = draw._drawn
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'&<!--\u2028'
# Parts of a run's identity, as real runs name them (tests/support/golden/result.json).
IDENTITY = (
    *("model", "tokenizer", "set of template options", "response length or prefix"),
    *("set of thinking blocks or answer tags", "set of scorers or markers"),
)
PLOTS = {
    *("front", "progress", "progress-in-time", "kernels", "importance", "norms", "cosines", "separation", "projection"),
    *("times", "memory"),
}


# One line of specifications after the other, until the input ends.
_PROGRAM = """
import json, sys
import vl_convert
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps({name: vl_convert.vegalite_to_svg(asked[name], allowed_base_urls=[]) for name in asked}), flush=True)
"""


class Pictures:
    """Stands for `draw._drawn`, and draws the same only once, in one process: to start one takes most of the time of a page."""

    def __init__(self) -> None:
        self._drawn: dict[str, str] = {}
        self._script = ""
        self._process: subprocess.Popen[str] | None = None

    def _new(self, svg: Mapping[str, Any]) -> dict[str, str]:
        """Pictures that weren't drawn before; where this process fails, `draw._drawn` says so."""
        if self._process is None:  # it ends with its input, when this process does
            command, pipe = [sys.executable, "-P", "-c", _PROGRAM], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(draw.drawable(svg)) + "\n")
            self._process.stdin.flush()
            found: dict[str, str] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._process = None
            found = DRAWN(svg=svg)["drawn"]
        return found

    def drawn(self, *, svg: Mapping[str, Any] | None = None, script: bool = False, **more: Any) -> dict[str, Any]:
        """As `draw._drawn`; images of other kinds (`more`) are drawn each time."""
        if svg is None and more:
            return DRAWN(script=script, **more)
        svg = svg or {}
        places = {name: json.dumps(spec) for name, spec in svg.items()}
        missing = {name: svg[name] for name, place in places.items() if place not in self._drawn}
        if missing:
            self._drawn |= {places[name]: picture for name, picture in self._new(missing).items()}
        if script and not self._script:
            self._script = DRAWN(script=True)["script"]
        return {"drawn": {name: self._drawn[place] for name, place in places.items()}, "script": self._script}


PICTURES = Pictures()


def made_heldout(trial: int, word: str) -> dict[str, Any]:
    """A held-out record as a run writes it for its selected trial."""
    few, many, spread = rate(3, 100), rate(97, 100), {"mean": 0.25, "median": 0.125, "max": 0.5}
    kinds = {"count": few, "refused": few, "broken": few, "off_topic": few, "answered": many}
    side = {"answered": few, "faults": {"empty": 1}, "harmless_refusals": few, "over_refusals": None, "unanswered": kinds}
    differ = {"prompt": f"ask {word}", "response": f"Sorry {word}", "judge": False, "markers": True}
    judge = {"name": word, "base": many, "candidate": few, "disagreements": [differ], "error": ""}
    return {
        "trial": trial,
        "prompts": {"harmful_heldout": {"source": word, "count": 100, "dropped": 4, "repeated": 1, "digest": "d"}},
        "base": side | {"refusals": many},
        "candidate": side | {"refusals": few},
        "kl": spread,
        "kl_answers": spread | {"tokens": 9},
        "perplexity": {"base": 1.5, "candidate": 1.75},
        "unchanged": few | {"first_difference": 21.5},
        "judges": [judge, judge | {"error": f"unreachable {word}"}],
        "scores": {
            f"own {word}": {"base": 1, "candidate": {"value": word}, "values": {"base": 1.25, "candidate": 1e6}, "error": ""},
            "broken": {"base": None, "candidate": None, "values": None, "error": f"no score {word}"},
        },
        "search": {"refusals": few, "unanswered": kinds, "kl": spread},
        "optimism": {"refusals": 0.02, "kl": -0.5},
    }


def made_run(folder: Path, word: str = "plain", count: int = 40, *, refined: bool = False) -> RunDirectory:
    """A made-up run directory with `count` trials and all artifacts; `word` stands in every place for foreign text.

    `refined`: it has one more trial, a refined one, which is selected.
    """
    folder.mkdir(parents=True)
    trials = [trial.to_record() for trial in made_trials(count)]
    for trial in trials:
        kernels = trial["params"]["kernels"]
        trial["params"]["kernels"] = {f"{name} {word}": kernel for name, kernel in kernels.items()}
    failed = trials[1] | {"number": count, "state": "failed", "scores": {}, "reason": f"failed {word}"}
    baseline = Baseline(100, 100, {}, {"count": 100, "refused": 100, "broken": 0, "off_topic": 0, "answered": 0})
    front = [trial.number for trial in pareto_front(made_trials(count), baseline)]
    trials = [*trials, failed]
    if refined:
        trials.append(with_word(refined_trial(count + 1).to_record(), word))
        front.append(count + 1)
    result = {
        "format": 1,
        "model": {
            "id": f"model {word}",
            "revision": "",
            "fingerprint": "f",
            "n_layers": 10,
            "d_model": 8,
            "dtype": "float32",
        },
        "prompts": {
            "harmful": {"source": word, "count": 3, "digest": "d"},
            "harmful_eval": {"source": word, "count": 100, "digest": "digest of harmful_eval"},
            "harmless_eval": {"source": word, "count": 100, "digest": "digest of harmless_eval"},
        },
        "rendering": "a rendering",
        "identity": {name: f"identity of the {name}" for name in IDENTITY},
        "objectives": to_records(DEFAULT),
        "baseline": baseline.to_record(),
        "trials": trials,
        "front": front,
        "selected": front[-1],
        "export": {"kind": "merged", "path": "model", "verified": True, "pushed": word},
        "timings": {"load": 1.5, f"search {word}": 30.0, "report": 9.0},
        "memory": {"stages": {"load": {"peak_rss_bytes": 2**30, "peak_device_bytes": 2**29}}},
        "caches": {"residuals": {"hits": 1, "misses": 2}},
        "environment": {"versions": {"abliterate": "0"}, "platform": word, "device": "cpu"},
        "directions": {"sha256": "d", "vectors_sha256": "v"},
        "yardstick": {"bounds": {"topic": 0.25}, "answers": 7, "quantiles": {"topic": {"0.05": 0.25, "0.5": 1.5}}},
        "heldout": made_heldout(front[-1], word),
        "later": {"refusals": {"count": 7, "note": word}},
    }
    points = [[0.5, 1.0], [-0.5, None], [0.0, 2.0]]
    named = ("norm_harmful", "norm_harmless", "norm_difference", "cos_means", "cos_harmful_direction", "cos_harmless_direction")
    layers = [
        {"index": index, **dict.fromkeys(named, 0.5 + index), "silhouette": index / 20 or None, "probe": 0.9 if index else None}
        for index in range(11)
    ]
    geometry = {
        "format": 1,
        "directions": "d",
        "layers": layers,
        "sampled": {"harmful": 3, "harmless": 3},
        "prompts": {"harmful": [word] * 3, "harmless": ["mild"] * 3},
        "projection": [{"harmful": points, "harmless": points, "explained": [0.5, 0.2]} for _ in range(11)],
        "reason": "",
    }
    said = {"text": f"Sorry {word}", "refusal": True, "thinking_open": False, "markers": [[0, 5], [6, 6 + len(word)]]}
    rows = [{"prompt": f"ask {word}", "base": said, "edited": said | {"refusal": False, "markers": []}}]
    answers = {"format": 1, "trial": front[-1], "max_new_tokens": 9, "harmful": rows, "harmless": rows}
    directory = RunDirectory(folder)
    for path, record in ((directory.result, result), (directory.geometry, geometry), (directory.answers, answers)):
        write_json(path, record)
    directory.settings.write_text(
        'model = "/home/me/secret-models/mine"\nseed = 7\ncache_dir = "/home/me/cache"\nout = "/home/me/runs"\n'
        '[prompts]\nharmful = "/home/me/prompts.txt"\nsystem = "/think"\n'
        '[search]\nstorage = "postgresql://me:hunter2@db/x"\n[evaluation]\nmarkers = "C:\\\\Users\\\\me\\\\markers.txt"\n',
        encoding="utf-8",
    )
    return directory


def with_word(trial: dict[str, Any], word: str) -> dict[str, Any]:
    """The record of a refined trial, with `word` in its foreign texts."""
    params = trial["params"]
    facts = params["facts"]
    params["coeffs"] = {f"{name} {word}": coeff for name, coeff in params["coeffs"].items()}
    facts["cosine"] = {f"{name} {word}": cosine for name, cosine in facts["cosine"].items()}
    facts["prompts"] = {name: record | {"digest": word} for name, record in facts["prompts"].items()}
    facts |= {"learn": word, f"own {word}": [word], "validation": {"loss": 0.123456789, word: word}}
    return trial


def made_trials(count: int) -> list[Trial]:
    """KL depends on one parameter, refusals and unanswered prompts on another."""
    found = []
    for number in range(count):
        draw = random.Random(number)
        big, place = draw.uniform(0, 1.5), draw.uniform(0, 10)
        kernels = {"attn": Kernel(big, place, big / 2, draw.uniform(1, 5)), "mlp": Kernel(0.0, draw.uniform(0, 10), 0.0, 2.0)}
        params = TrialParams(draw.choice(["global", "per layer"]), draw.uniform(0, 9), kernels)
        refused, state = int(abs(place - 5) * 20), "stopped" if number % 3 else "complete"
        kinds = {"count": refused, "refused": refused, "broken": 0, "off_topic": 0, "answered": 100 - refused}
        unanswered = kinds if state == "complete" else {"count": refused}
        scores = {"kl": {"mean": big**2, "median": 0.0, "max": 1.0}, "refusals": refused, "unanswered": unanswered}
        found.append(Trial(number, params, state, scores, 1.0))
    return found
