"""Measure the peak memory of exports in a process of their own, above its memory when they begin."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from support.forked import Forked
from support.runs import Recorder, read_status, with_kind


def _give_back_at_once() -> None:
    """Return freed memory at once: glibc would keep a whole tiny model's worth, and each thread's heap reserves 64 MB."""
    mmap_threshold, arena_max = -3, -8
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 65536)
    libc.mallopt(arena_max, 1)
    libc.malloc_trim(0)


def _export_trial(warm: Path, real: Path, kind: str, cap: int) -> None:
    """In the child: print whether the export is verified, and its peak. `cap` limits the added address space; 0 is no limit."""
    import resource

    import torch

    from abliterate.artifacts.run_directory import RunDirectory
    from abliterate.model import memory
    from abliterate.model.checkpoint import load_weights
    from abliterate.model.loader import load_config
    from abliterate.pipeline import export_trial as pipeline_export_trial
    from abliterate.pipeline.export_gguf import GgufRequest, export_gguf
    from abliterate.settings.schema import LoadSettings
    from abliterate.settings.sources import load_settings

    torch.set_num_threads(1)
    _give_back_at_once()

    def export(folder: Path) -> bool | None:
        settings = load_settings("", {"model": str(folder / "base"), "cache_dir": str(folder / "cache")})
        run, out = RunDirectory(folder / "run"), folder / f"{kind}-{cap}"
        if kind == "gguf":
            request = GgufRequest(folder / "base.gguf", out)
            return export_gguf(settings, Recorder(), run, 0, request).export.verified
        return pipeline_export_trial.export_trial(with_kind(settings, kind), Recorder(), run, 0, out).export.verified

    export(warm)  # modules imported on first use
    if cap:
        resource.setrlimit(resource.RLIMIT_AS, (read_status("VmSize") + cap,) * 2)
        base = str(real / "base")
        try:
            load_weights(base, LoadSettings(), load_config(base, LoadSettings()), torch.float32, None)
        except (RuntimeError, MemoryError, OSError):
            pass
        else:
            sys.exit("the cap doesn't bite")
    assert memory._forget_peaks
    memory._forget_peaks = lambda: None  # a stage forgets the peaks of earlier stages
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    verified = export(real)
    print(verified, read_status("VmHWM") - before)


def _export_merged(base: Path, out: Path) -> None:
    """In the child: print the peak of a merged export of the model in `base`."""
    import torch
    from transformers import AutoModelForCausalLM

    from abliterate.export import EXPORTERS
    from support.exports import make_job
    from support.models import make_editor, make_loaded, make_params

    torch.set_num_threads(1)
    _give_back_at_once()
    loaded = make_loaded(AutoModelForCausalLM.from_pretrained(base), str(base))
    job = make_job(loaded, make_editor(loaded).factors(make_params(0)))
    del loaded
    EXPORTERS["merged"].write(job, out / "warm")  # modules imported on first use
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    EXPORTERS["merged"].write(job, out / "real")
    print(True, read_status("VmHWM") - before)


def _peak(process: Forked) -> int:
    assert process.end(timeout=120) == 0, process.err
    verified, peak = process.out.split()
    assert verified == "True"
    return int(peak)


def peak_of_a_later_export(folder: Path, kind: str, cap: int) -> int:
    """The bytes that `abliterate export` of the run in `folder` takes; `folder/warm` holds a small run to warm up with.

    The kind `gguf` edits the file `base.gguf` beside each run.
    """
    return _peak(Forked(_export_trial, (folder / "warm", folder / "real", kind, cap), folder))


def peak_of_a_merged_export(base: Path, out: Path) -> int:
    """The bytes that the merged export of a random edit takes."""
    return _peak(Forked(_export_merged, (base, out), out))
