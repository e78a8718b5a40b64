"""Vega-Lite specifications into pictures and into JavaScript, by vl-convert: no browser, no network. Knows no run.

vl-convert runs in a process of its own: where it fails it aborts the process (seen with control characters), and its engine's
memory is none of a run's. Where nothing can be drawn, there are no plots, and a sentence says why.
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

# For pictures; in the page the width is the reader's.
WIDTH = 640
# Of all pictures of a report: it takes about a second.
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
    """One sentence: why there are no plots, and what to do."""


def unavailable() -> str:
    """Why nothing can be drawn, in one sentence; empty where it may go well."""
    if importlib.util.find_spec("vl_convert") is None:
        return "There are no plots, because vl-convert-python isn't installed: pip install vl-convert-python, and repeat."
    return ""


def svg(specs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """{name: SVG} to stand in one page, each picture's ids its own; and the script that draws them there.

    The script is Vega, Vega-Lite and Vega-Embed as one, and sets `window.vegaEmbed`.

    Raises:
        Undrawable: with the sentence a person sees.
    """
    found = {}
    done = _drawn(svg=specs, script=True)
    for name, text in done["drawn"].items():
        text = re.sub(r'\bid="([\w-]+)"', rf'id="{name}-\1"', text)
        found[name] = re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", text)
    return found, in_script(done["script"])


def png(specs: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """{name: PNG}, black on white, two pixels for one. Raises as `svg` does."""
    drawn = _drawn(png={name: {**spec, "background": "white"} for name, spec in specs.items()})["drawn"]
    return {name: base64.b64decode(text) for name, text in drawn.items()}


def in_script(text: str) -> str:
    """JavaScript in which no string can end the element that holds it."""
    return re.sub(r"<(?=/?script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


def drawable(value: Any) -> Any:
    """A specification without the characters that no XML may hold."""
    if isinstance(value, str):
        return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", value)
    if isinstance(value, Mapping):
        return {name: drawable(part) for name, part in value.items()}
    return [drawable(part) for part in value] if isinstance(value, list | tuple) else value


def _drawn(**asked: Any) -> dict[str, Any]:
    if unavailable():
        raise Undrawable(unavailable())
    text = json.dumps({"svg": {}, "png": {}, "script": False} | {name: drawable(part) for name, part in asked.items()})
    try:
        # -P: a file of that name in the current folder isn't meant.
        command = [sys.executable, "-P", "-c", _PROGRAM]
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", timeout=_PATIENCE, check=True)
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise Undrawable(
            f"There are no plots, because vl-convert failed ({type(error).__name__}); abliterate report RUN tries again, pip "
            "install --upgrade vl-convert-python may help."
        ) from error
