"""Turn Vega-Lite specifications into pictures and JavaScript by vl-convert, without a browser or a network.

vl-convert runs in a process of its own, because a failure of it aborts the process (seen with control characters), and so that
the memory of its engine isn't counted as the run's. Where nothing can be drawn, there are no plots, and a sentence says why.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# The width of pictures; in the page a plot is as wide as the reader's window allows.
WIDTH = 640
# Seconds for all pictures of a report, which take about one second.
_PATIENCE = 120
_PROGRAM = """
import base64, json, sys
import vl_convert
asked = json.load(sys.stdin)
drawn = {}
for name, spec in asked["svg"].items():
    drawn[name] = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
for name, spec in asked["png"].items():
    drawn[name] = base64.b64encode(vl_convert.vegalite_to_png(spec, scale=2, allowed_base_urls=[])).decode()
script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;") if asked["script"] else ""
print(json.dumps({"drawn": drawn, "script": script}))
"""


class Undrawable(Exception):
    """Its sentence says why there are no plots, and what to do."""


def unavailable() -> str:
    """A sentence that says why nothing can be drawn; empty where drawing may succeed."""
    if importlib.util.find_spec("vl_convert") is None:
        return "There are no plots, because vl-convert-python isn't installed: pip install vl-convert-python, and repeat."
    return ""


def svg(specs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """{name: SVG} for one page, with ids that no two pictures share; and the script that draws them there.

    The script is Vega, Vega-Lite and Vega-Embed in one, and sets `window.vegaEmbed`.

    Raises:
        Undrawable: with the sentence that a person sees.
    """
    pictures = {}
    done = _drawn(svg=specs, script=True)
    for name, text in done["drawn"].items():
        text = re.sub(r'\bid="([\w-]+)"', rf'id="{name}-\1"', text)
        pictures[name] = re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", text)
    return pictures, in_script(done["script"])


def library() -> str:
    """The script that draws plots in a page, as in `svg`. Raises as `svg` does."""
    return in_script(_drawn(script=True)["script"])


def png(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """{name: PNG}, black on white, at twice the size. Raises as `svg` does."""
    drawn = _drawn(png={name: {**spec, "background": "white"} for name, spec in specs.items()})["drawn"]
    return {name: base64.b64decode(text) for name, text in drawn.items()}


def in_script(text: str) -> str:
    """JavaScript in which no string can end the element that holds it."""
    return re.sub(r"<(?=/?script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


def drawable(value: Any) -> Any:
    """A specification without the characters that XML forbids."""
    if isinstance(value, str):
        return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value)
    if isinstance(value, Mapping):
        return {name: drawable(inner) for name, inner in value.items()}
    return [drawable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _drawn(**asked: Any) -> dict[str, Any]:
    if unavailable():
        raise Undrawable(unavailable())
    text = json.dumps({"svg": {}, "png": {}, "script": False} | {name: drawable(request) for name, request in asked.items()})
    try:
        # -P: a file vl_convert.py in the current folder must not be imported.
        command = [sys.executable, "-P", "-c", _PROGRAM]
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=_PATIENCE, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise Undrawable(
            f"There are no plots, because vl-convert failed ({type(error).__name__}); abliterate report RUN tries again, "
            f"{_remedy()} may help."
        ) from error


def _remedy() -> str:
    """What may help where vl-convert fails: its engine reserves much more address space than it uses."""
    try:
        import resource
    except ImportError:  # on Windows
        return "pip install --upgrade vl-convert-python"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return "pip install --upgrade vl-convert-python"
    return f"a larger limit on address space (ulimit -v; it is {limit / 2**30:.0f} GiB)"
