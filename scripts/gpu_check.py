"""Measure the project on a device, step by step, each within a time limit; a table, JSON and logs are written.

    python scripts/gpu_check.py --out FOLDER            on a CUDA machine: an 8B shape in bfloat16, about ten minutes
    python scripts/gpu_check.py --out FOLDER --small    on a CPU, with small shapes, to try the script itself

Steps: machine, inflate, ours, reference, heretic, static, equality, tight, refine, profile, tune, export. Give some of them
to run these alone; `inflate` comes first, and `ours` before profile and export. A step that fails or takes too long is told,
and doesn't end the others. The model is the demo, inflated with its function kept (`inflate_model.py`), so that trials refuse
and answer as the demo's do. heretic is compared if its command is on the PATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from inflate_model import Shape, inflate
from rig import make_rig, settings_of, timed
from tool import command

from abliterate.files import read_toml
from abliterate.model.devices import device_name
from abliterate.model.loader import demo_path
from abliterate.settings.sources import load_settings

GIB = 2**30
PROMPTS = {
    "harmful": "harmful_train",
    "harmless": "harmless_train",
    "harmful_eval": "harmful_eval",
    "harmless_eval": "harmless_eval",
}
# Beside the weights, a run under memory pressure gets so much.
LEFT_GIB = 2.0
# The inflated model and its export take so much.
SHARED_GIB = 36
Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured: the device, the model's shape and dtype, and the numbers of trials."""

    out: Path
    device: str
    shape: Shape
    dtype: str
    trials: Mapping[str, int]

    @property
    def model(self) -> Path:
        """The inflated model; in memory where there is room, because writing 16 GB to a disk takes minutes."""
        shared = Path("/dev/shm")  # often of 64 MB in a container
        big = self.shape.width >= 4096 and shared.is_dir() and shutil.disk_usage(shared).total >= SHARED_GIB * GIB
        return (shared if big else self.out) / f"gpu-check-{self.shape.layers}x{self.shape.width}"

    @property
    def options(self) -> list[str]:
        """Options of every run of the inflated model."""
        prompts = [f"--{name.replace('_', '-')}={demo_path() / 'prompts' / f'{stem}.jsonl'}" for name, stem in PROMPTS.items()]
        fixed = ["--seed", "1", "--json", "--set", "evaluation.heldout=false", "--cache-dir", str(self.out / "cache")]
        return ["--device", self.device, "--dtype", self.dtype, *prompts, *fixed]


LARGE = Shape(32, 4096, 14336, 32, 8, 128)
SMALL = Shape(14, 256, 512, 4, 2, 64)


def plan_of(out: Path, device: str, *, small: bool) -> Plan:
    """An 8B shape on a device, or a small one to try the script."""
    if small:
        trials = {"ours": 12, "reference": 2, "heretic": 2, "static": 3, "equality": 3, "tight": 2}
        return Plan(out, device, SMALL, "float32", trials)
    trials = {"ours": 60, "reference": 6, "heretic": 6, "static": 10, "equality": 20, "tight": 6}
    return Plan(out, device, LARGE, "bfloat16", trials)


# -- steps; each runs in a process of its own and prints one line of JSON


def machine(plan: Plan) -> Found:
    """The device, its software, its rate of matrix products and its bandwidth."""
    size, dtype = (8192, torch.bfloat16) if plan.device.startswith("cuda") else (1024, torch.float32)
    first = torch.randn(size, size, device=plan.device).to(dtype)
    rate = 2 * size**3 / seconds_of(plan, lambda: first @ first)
    block = torch.empty((4 << 30) if plan.device.startswith("cuda") else (64 << 20), dtype=torch.uint8, device=plan.device)
    bandwidth = 2 * block.nbytes / seconds_of(plan, block.clone)
    found = {"device": device_name(torch.device(plan.device)), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {name: __import__(name).__version__ for name in ("transformers", "peft", "optuna")}
    if plan.device.startswith("cuda"):
        found["driver"] = run_text(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found | {"TFLOP/s": round(rate / 1e12, 2), "GB/s": round(bandwidth / 1e9, 1)}


def inflated(plan: Plan) -> Found:
    """The demo in the plan's shape."""
    count, seconds = timed(
        lambda: inflate(demo_path() / "model", plan.model, plan.shape, getattr(torch, plan.dtype), device=plan.device)
    )
    return {"parameters": count, "seconds": round(seconds, 1)}


def ours(plan: Plan) -> Found:
    """A search as users run it, but for its refinement."""
    return searched(plan, "ours", "--no-refine")


def reference(plan: Plan) -> Found:
    """The same without efficiencies."""
    return searched(plan, "reference", "--no-refine", "--reference")


# {way of decoding: its settings}
WAYS = {"drafts": (), "plain": ("use_drafts=false",), "static": ("use_static_cache=true",)}


def static(plan: Plan) -> Found:
    """The same random trials with drafts, without them, and in a static cache with graphs: their seconds and results."""
    found: Found = {}
    records: dict[str, list[Found]] = {}
    count = plan.trials["static"]
    for way, switches in WAYS.items():
        options = [word for switch in switches for word in ("--set", f"efficiency.{switch}")]
        # Random trials, because the sampler would answer a difference by rounding with other parameters.
        run = searched(plan, f"static-{way}", "--no-refine", "--set", f"search.startup_trials={count}", *options, trials=count)
        found[way] = {name: run[name] for name in ("mean s", "mean s of complete", "start-up s", "peak device GiB")}
        records[way] = read_result(plan.out / "runs" / f"static-{way}")["trials"]
    return found | {f"{way} and plain": compared(records[way], records["plain"]) for way in WAYS if way != "plain"}


def equality(plan: Plan) -> Found:
    """Runs of the demo in float32 on the device and on the CPU: the largest differences of their trials."""
    records = []
    for device in (plan.device, "cpu"):
        out = plan.out / "runs" / f"equality-{device}"
        count = plan.trials["equality"]  # random trials, as in `static`
        options = ["--device", device, "--dtype", "float32", "--no-refine", "--export", "none", "--seed", "1", "--restart"]
        options += ["--set", "edit.mode=full"]  # no inputs of modules, which each device would capture along its own answers
        tool(command("run", "demo", *options, "-n", count, "--set", f"search.startup_trials={count}", "-o", out))
        records.append(read_result(out)["trials"])
    return compared(*records)


def compared(trials: Sequence[Found], others: Sequence[Found]) -> Found:
    """How two records of the same trials differ."""
    pairs = list(zip(trials, others, strict=True))
    both = [(one, other) for one, other in pairs if one["state"] == other["state"] == "complete"]
    return {
        "trials": len(pairs),
        "same state": sum(one["state"] == other["state"] for one, other in pairs),
        "same refusals": sum(one["scores"]["refusals"] == other["scores"]["refusals"] for one, other in both),
        "complete": len(both),
        "largest difference of KL": max((abs(kl(one) - kl(other)) for one, other in both), default=0.0),
    }


def tight(plan: Plan) -> Found:
    """A run while another process holds all memory but a little; on a CPU only the run, since its system kills processes."""
    if not plan.device.startswith("cuda"):
        return searched(plan, "tight", "--no-refine")
    weights = sum(path.stat().st_size for path in plan.model.glob("*.safetensors"))
    code = (
        "import torch, time\n"
        f"free, _ = torch.cuda.mem_get_info(); keep = {weights + LEFT_GIB * GIB}\n"
        "held = torch.empty(int(free - keep), dtype=torch.uint8, device='cuda')\n"
        "print(held.nbytes, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as hog:
        assert hog.stdout is not None
        try:
            held = int(hog.stdout.readline())
            return searched(plan, "tight", "--no-refine") | {"held GiB": round(held / GIB, 1)}
        finally:
            hog.kill()


def refine(plan: Plan) -> Found:
    """Two descents without a search: seconds a step, and peak memory."""
    steps = 10
    more = ["--set", f"refine.steps={steps}", "--set", "refine.betas=[1.0, 4.0]"]
    found = searched(plan, "refine", *more, trials=0)
    result = read_result(plan.out / "runs" / "refine")
    spent = result["timings"].get("refine", 0.0)
    return found | {"seconds a step, with looks and scores": round(spent / (2 * steps), 3)}


def profile(plan: Plan) -> Found:
    """Where a survivor's time goes, and what plain passes of the model take."""
    sets = {name: str(demo_path() / "prompts" / f"{stem}.jsonl") for name, stem in PROMPTS.items()}
    options = {"model": str(plan.model), "device": plan.device, "load": {"dtypes": [plan.dtype]}, "prompts": sets}
    run = plan.out / "runs" / "ours"
    options |= {"edit": {"mode": read_toml(run / "settings.toml")["edit"]["mode"]}}  # for which its trials were found
    rig = make_rig(load_settings("", options | {"cache_dir": str(plan.out / "cache"), "evaluation": {"heldout": False}}))
    study = trials_of(run)
    survivors = [trial for trial in study if trial.state == "complete"][-3:]
    done: list[Any] = []
    for trial in study[:25]:  # drafts learn from them
        done.append(rig.evaluate(trial.number, trial.params, rig.pruner(done)))
    found: Found = {"survivors": []}
    for trial in survivors:
        passes, tokens = rig.counters.passes, rig.counters.tokens
        _, seconds = timed(
            lambda trial=trial: synchronized(plan, lambda: rig.evaluate(trial.number, trial.params, rig.pruner([])))
        )
        row = {"seconds": round(seconds, 3), "passes": rig.counters.passes - passes, "tokens": rig.counters.tokens - tokens}
        found["survivors"].append(row)
    if survivors:
        found |= profiled(plan, lambda: rig.evaluate(0, survivors[-1].params, rig.pruner([])))
    return found | plain_passes(plan, rig.bench.loaded.model)


def tune(plan: Plan) -> Found:
    """Batch sizes, measured anew."""
    options = ["--device", plan.device, "--dtype", plan.dtype, "--json", "--cache-dir", plan.out / "cache-tune"]
    lines = tool(command("tune-batch", plan.model, *options, *(word for text in demo_prompts() for word in ("--set", text))))
    found = json.loads(lines[-1])["operations"]
    return {name: {"size": one["size"], "estimate": one["estimate"]} for name, one in found.items()}


def export(plan: Plan) -> Found:
    """A merged export of the selected trial, checked."""
    run = plan.out / "runs" / "ours"
    selected, target = read_result(run)["selected"], plan.model.with_name(plan.model.name + "-export")
    _, seconds = timed(lambda: tool(command("export", run, "--trial", selected, "--kind", "merged", "-o", target)))
    return {"seconds": round(seconds, 1), "GiB": round(sum(path.stat().st_size for path in target.iterdir()) / GIB, 2)}


def heretic(plan: Plan) -> Found:
    """heretic on the same model, prompts and seed, if it is installed."""
    from peer import run_heretic  # not needed by the other steps

    settings = settings_of("demo", 1, [f"model={plan.model}", f"load.dtypes=['{plan.dtype}']", *demo_prompts()])
    folder = plan.out / "heretic"
    folder.mkdir(parents=True, exist_ok=True)
    peer = run_heretic(settings, plan.trials["heretic"], torch.get_num_threads(), folder)
    if isinstance(peer, str):
        return {"not run": peer}
    return {"trials": len(peer.trials), "mean s": round(statistics.mean(peer.seconds), 3), "start-up s": round(peer.before, 1)}


# (name, step, seconds that it may take)
STEPS: tuple[tuple[str, Callable[[Plan], Found], int], ...] = (
    ("machine", machine, 60),
    ("inflate", inflated, 120),
    ("ours", ours, 180),
    ("reference", reference, 150),
    ("heretic", heretic, 170),
    ("static", static, 180),
    ("equality", equality, 120),
    ("tight", tight, 120),
    ("refine", refine, 150),
    ("profile", profile, 150),
    ("tune", tune, 90),
    ("export", export, 120),
)


# -- what steps share


def demo_prompts() -> list[str]:
    """The demo's prompt sets, as assignments."""
    return [f"prompts.{name}={demo_path() / 'prompts' / f'{stem}.jsonl'}" for name, stem in PROMPTS.items()]


def tool(words: Sequence[str]) -> list[str]:
    """The lines that the tool writes; SystemExit with its last words if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    if done.returncode:
        raise SystemExit(f"{words[3]} ended with {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1:]}")
    return done.stdout.strip().splitlines()


def run_text(words: Sequence[str]) -> str:
    """A command's output; "" if there is no such command."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def searched(plan: Plan, name: str, *more: str, trials: int | None = None) -> Found:
    """A run of the inflated model, in numbers."""
    out, count = plan.out / "runs" / name, plan.trials.get(name, 0) if trials is None else trials
    tool(command("run", plan.model, *plan.options, "-n", count, "-o", out, "--restart", "--export", "none", *more))
    return summary(read_result(out))


def read_result(run: Path) -> Found:
    """A run's result.json."""
    found: Found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def trials_of(run: Path) -> list[Any]:
    """A run's trials."""
    from abliterate.artifacts.result import Result
    from abliterate.artifacts.run_directory import RunDirectory

    return list(Result.read(RunDirectory(run)).trials)


def kl(trial: Mapping[str, Any]) -> float:
    """A trial's mean KL in result.json."""
    return float(trial["scores"]["kl"]["mean"])


def summary(result: Mapping[str, Any]) -> Found:
    """Seconds of trials by state, of start-up, and peak memory."""
    by_state: dict[str, list[float]] = {}
    for trial in result["trials"]:
        by_state.setdefault(trial["state"], []).append(trial["seconds"])
    every = [seconds for each in by_state.values() for seconds in each]
    before = {
        name: value for name, value in result["timings"].items() if name not in ("search", "refine", "report", "held-out")
    }
    return {
        "trials": {state: len(each) for state, each in by_state.items()},
        "mean s": round(statistics.mean(every), 3) if every else 0.0,
        "mean s of complete": round(statistics.mean(by_state["complete"]), 3) if "complete" in by_state else None,
        "start-up s": round(sum(before.values()), 1),
        "batch": result["batch_sizes"],
        "peak GiB": round(result["memory"]["peak_rss_bytes"] / GIB, 2),
        "peak device GiB": round(result["memory"]["peak_device_bytes"] / GIB, 2),
    }


def synchronized(plan: Plan, work: Callable[[], Any]) -> Any:
    """The result of `work`, when the device has done it."""
    found = work()
    if plan.device.startswith("cuda"):
        torch.cuda.synchronize()
    return found


def seconds_of(plan: Plan, work: Callable[[], Any], times: int = 10) -> float:
    """The seconds of one call among several, after three that warm up."""
    for _ in range(3):
        synchronized(plan, work)

    def several() -> None:
        for _ in range(times):
            work()  # no result is kept: ten of them would be measured with the time to get their memory, or not fit

    _, seconds = timed(lambda: synchronized(plan, several))
    return float(seconds) / times


def profiled(plan: Plan, work: Callable[[], Any]) -> Found:
    """The wall time of `work`, how long the device was busy in it, and the operations that took most; a log has more."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = plan.device.startswith("cuda")
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        _, wall = timed(lambda: synchronized(plan, work))
    events = seen.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(events.table(sort_by=key, row_limit=20, max_name_column_width=60), file=sys.stderr)
    if cuda:  # an operation of the CPU has the time of the kernels that it launched, which are events of their own
        events = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    most = sorted(events, key=lambda event: -float(getattr(event, key)))[:5]
    busy = sum(float(getattr(event, "self_device_time_total", 0.0)) for event in events) / 1e6
    found: Found = {"profiled s": round(wall, 3), "most": [[event.key, round(getattr(event, key) / 1e6, 3)] for event in most]}
    return found | ({"device busy s": round(busy, 3)} if cuda else {})


@torch.inference_mode()
def plain_passes(plan: Plan, model: Any) -> Found:
    """Milliseconds of plain passes of 100 rows: a prefill of 60 tokens with its rate, then 1 and 8 tokens after it."""
    found: Found = {}

    def ids(width: int) -> torch.Tensor:
        return torch.randint(5, 900, (100, width), device=model.device)

    rows = ids(60)
    prefill = seconds_of(plan, lambda: model(rows, use_cache=False, logits_to_keep=1), times=3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found["prefill 100 × 60, ms"], found["TFLOP/s"] = round(1e3 * prefill, 2), round(2 * parameters * 6000 / prefill / 1e12, 2)
    for width in (1, 8):
        cache, tokens = model(rows, use_cache=True, logits_to_keep=1).past_key_values, ids(width)
        step = seconds_of(
            plan, lambda tokens=tokens, cache=cache: model(tokens, past_key_values=cache, use_cache=True), times=5
        )
        found[f"100 × {width} after it, ms"] = round(1e3 * step, 2)
    return found


# -- all steps


def run_step(name: str, limit: int, arguments: Sequence[str], out: Path) -> Found:
    """A step in a process of its own, so that a crash or a hang ends nothing but it."""
    words = [sys.executable, __file__, *arguments, "--step", name]
    started = time.perf_counter()
    log = out / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        try:
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            code, output = within(limit, words, environment, file)
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {limit} s (see {log.name})"}
    lines = output.decode("utf-8", "replace").strip().splitlines()
    if code or not lines:
        return {"failed": f"ended with {code} (see {log.name})"}
    found: Found = json.loads(lines[-1])
    return {**found, "step s": round(time.perf_counter() - started, 1)}


def within(limit: float, words: Sequence[str], environment: Mapping[str, str], errors: IO[str]) -> tuple[int, bytes]:
    """A command's exit code and output. TimeoutExpired after `limit` seconds: it is killed, and so is all that it began.

    A run or a process that holds memory would go on, and take the device from later steps.
    """
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=limit)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


def table(found: Mapping[str, Found]) -> str:
    """The figures in Markdown, one row a step."""
    lines = ["| step | figures |", "|---|---|"]
    for name, figures in found.items():
        flat = "; ".join(f"{key}: {value}" for key, value in figures.items())
        lines.append(f"| {name} | {flat.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Carry out the steps, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", help="these steps only")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs, logs, results.json and table.md")
    parser.add_argument("--device", default="", help="default: cuda, or cpu with --small")
    parser.add_argument("--small", action="store_true", help="small shapes and few trials, to try the script")
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    plan = plan_of(args.out.resolve(), args.device or ("cpu" if args.small else "cuda"), small=args.small)
    known = {name: (step, limit) for name, step, limit in STEPS}
    if args.step:
        print(json.dumps(known[args.step][0](plan)))
        return
    if unknown := set(args.steps) - known.keys():
        parser.error(f"no step is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    plan.out.mkdir(parents=True, exist_ok=True)
    passed_on = ["--out", str(plan.out), "--device", plan.device, *(["--small"] if args.small else [])]
    results = plan.out / "results.json"
    found: dict[str, Found] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    for name in args.steps or known:
        found[name] = run_step(name, known[name][1], passed_on, plan.out)
        results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (plan.out / "table.md").write_text(table(found), encoding="utf-8")
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
