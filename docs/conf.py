"""How Sphinx builds these pages: MyST Markdown, the furo theme, everything from local files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent

project = "shoal"
author = "the shoal authors"
copyright = "the shoal authors, Apache-2.0"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4  # pages link to each other's headings as page.md#heading

html_theme = "furo"
html_title = f"shoal {version}"
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["formulas.css"]

# What docutils' converter does not know, in words that it knows. Fences find their own size in MathML.
SPELLINGS = [
    (re.compile(r"\\[bB]igg?[lmr]?(?![A-Za-z])"), ""),
    (re.compile(r"\\[td]?frac(?![A-Za-z])\s*(\w)\s*(\w)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(text|display)style(?![A-Za-z])"), ""),
    (re.compile(r"\\dots(?![A-Za-z])"), r"\\ldots "),
    (re.compile(r"\\qed(?![A-Za-z])"), r"\\square "),
    (re.compile(r"(begin|end)\{align\*?\}"), r"\1{aligned}"),
    (re.compile("±"), r"\\pm "),
]


def _mathml(writer: Any, node: nodes.Element) -> None:
    """A formula as MathML, which browsers draw themselves: no script is fetched, and the pages read offline."""
    block = isinstance(node, nodes.math_block)
    formula = node.astext()
    for known, spelled in SPELLINGS:
        formula = known.sub(spelled, formula)
    try:
        drawn = tex2mathml(formula, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from None
    writer.body.append(f"<div class='formula'>{drawn}</div>" if block else drawn)
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the formula renderer."""
    app.add_html_math_renderer("mathml", inline_renderers=(_mathml, None), block_renderers=(_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
