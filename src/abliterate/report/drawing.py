"""Vega-Lite specifications into pictures and into JavaScript, by vl-convert: no browser, no network. Knows no run.

The library is imported when something is drawn. Where it can't be, there are no plots, and `unavailable` says why.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

# For pictures; in the page the width is the reader's.
WIDTH = 640


@functools.cache
def unavailable() -> str:
    """Why nothing can be drawn, in one sentence; empty where it can."""
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        return "There are no plots, because vl-convert-python can't be imported: pip install vl-convert-python, and repeat."
    return ""


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets `window.vegaEmbed`, safe inside a script element."""
    import vl_convert

    return in_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def in_script(text: str) -> str:
    """JavaScript in which no string can end the element that holds it."""
    return re.sub(r"<(?=/?script|!--)", r"\\x3c", text, flags=re.IGNORECASE)


def svg(spec: Mapping[str, Any], name: str) -> str:
    """The picture as SVG to stand in a page; `name` keeps its ids apart from other pictures'."""
    import vl_convert

    text = vl_convert.vegalite_to_svg(dict(spec), allowed_base_urls=[])
    text = re.sub(r'\bid="([\w-]+)"', rf'id="{name}-\1"', text)
    return re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", text)


def png(spec: Mapping[str, Any]) -> bytes:
    """The picture as PNG, black on white, two pixels for one."""
    import vl_convert

    return vl_convert.vegalite_to_png({**spec, "background": "white"}, scale=2, allowed_base_urls=[])
