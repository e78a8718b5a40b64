"""The report's last sections: cost, coverage, and everything that a run depends on. Knows no plots but their names."""

from __future__ import annotations

from collections.abc import Callable

from abliterate.report.markup import details, missing, pairs, paragraph, table
from abliterate.report.material import Material

# A plot's place: its HTML by name, empty where there is none.
Figure = Callable[[str], str]
_SHOWN_ELSEWHERE = {
    *("format", "model", "prompts", "objectives", "baseline", "trials", "front", "selected", "export", "timings", "memory"),
    *("caches", "environment", "coverage", "batch_sizes", "identity", "startup_trials", "directions", "sha256"),
    *("heldout", "response_prefix", "rendering"),
}


def cost(material: Material, figure: Figure) -> str:
    """Time and memory by stage, and what caches did."""
    result = material.result
    spent = material.stages(result["timings"])
    if not spent:
        return ""
    peaks = material.stages(result["memory"].get("stages", {}))
    rows = [
        (name, f"{seconds:.1f}", *(_gib(peaks.get(name, {}).get(f"peak_{place}_bytes")) for place in ("rss", "device")))
        for name, seconds in spent.items()
    ]
    rows.append(("all", f"{sum(spent.values()):.1f}", "", ""))
    head = ("stage", "seconds", "peak of main memory, GiB", "peak on the device, GiB")
    caches = [(name, count["hits"], count["misses"]) for name, count in result["caches"].items()]
    return (
        figure("times")
        + figure("memory")
        + details("As a table", table(head, rows, "Before this report was written"))
        + table(("cache", "hits", "misses"), caches, "Caches")
    )


def _gib(value: int | None) -> str:
    return f"{value / 2**30:.3f}" if value else "—"


def coverage(material: Material) -> str:
    """What of the model is edited, what not and why."""
    found = material.result.get("coverage")
    if not found:
        return missing("This run says nothing of what was edited: it was made by an earlier version.")
    text = f"{found['share']:.1%} of the parameters that write to the residual stream can be edited."
    rows = [
        (
            group["component"],
            group["path"],
            group["layers"],
            group["matrices"],
            " × ".join(map(str, group["shape"])) if group["shape"] else "?",
            f"{group['parameters']:,}",
            "yes" if group["edited"] else f"no: {group['left_out']}",
        )
        for group in found["groups"]
    ]
    head = ("component", "module", "layers", "matrices", "d_out × d_in", "parameters", "edited")
    untold = paragraph(f"How much this is can't be told: {found['untold']}.") if found.get("untold") else ""
    return paragraph(text) + table(head, rows, "What writes to the residual stream", texts=(1, 6)) + untold


def facts(material: Material) -> str:
    """What the run was: model, versions, seeds, prompts, export, settings."""
    result = material.result
    environment = result.get("environment", {})
    seeds = {"seed": material.settings.get("seed"), "random trials first": result.get("startup_trials")}
    asked = {"prefix of every response": result.get("response_prefix"), "hash of a prompt as asked": result.get("rendering")}
    machine = {"device": environment.get("device"), "platform": environment.get("platform")}
    settings = (
        details(
            f"All {len(material.settings)} settings", pairs(material.settings, "Settings as resolved; of paths only the name")
        )
        if material.settings
        else missing(material.missing["settings"])
    )
    return (
        pairs(result["model"], "Model")
        + pairs(environment.get("versions", {}) | machine, "Versions")
        + pairs(seeds, "Seeds")
        + details("Prompts", pairs(result.get("prompts", {}) | asked, "Prompt sets"))
        + details("Export and its check", pairs(result["export"], "Export"))
        + details("Batch sizes", pairs(result.get("batch_sizes", {}), "Prompts at a time"))
        + details("What the trials depend on", pairs(result.get("identity", {}), "Hashes and names"))
        + settings
    )


def further(material: Material) -> str:
    """Whatever else is in the result: shown plainly rather than left out."""
    others = {name: value for name, value in material.result.items() if name not in _SHOWN_ELSEWHERE and value}
    return "".join(pairs(value if isinstance(value, dict) else {name: value}, name) for name, value in others.items())
