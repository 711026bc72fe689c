"""How the pages become a site: `make docs`, which needs no network, as does the site.

The pages are plain Markdown that also reads well on a forge. Three things are done to them here:
the lists of pages in index.md become the sidebar, a link to code leads to its place in
the reference, which has the code beside it, and formulas become MathML, which browsers draw without
a script.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import iddc

project = "iddc"
author = copyright = "the authors of iddc"  # noqa: A001  (Sphinx's name)
release = iddc.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"iddc {release}"
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
nitpick_ignore_regex = [(r"py:.*", r"(?!iddc\.(Seg|losses|errors|config)).*")]
"""Names of other projects, whose references are not at hand, and shapes."""

SECTION = re.compile(r"^## (.+)\n((?:(?!## ).*\n?)*)", re.MULTILINE)
PAGE = re.compile(r"^- \[[^]]+\]\(([\w/-]+)\.md\)", re.MULTILINE)
CODE = re.compile(r"\[`(\w+)`\]\(\.\./src/([\w/]+)\.py(?:#L\d+)?\)")


def setup(app: Sphinx) -> None:
    """Register the changes."""
    app.add_html_math_renderer("mathml", (draw_formula, None), (draw_formula, None))
    app.connect("source-read", rewrite)
    app.connect("autodoc-process-docstring", keep_formulas, priority=400)  # before napoleon


def rewrite(_app: Sphinx, page: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    text = source[0]
    if page == "index":  # the list of each section becomes a part of the sidebar
        for title, body in SECTION.findall(text):
            contents = "\n".join(PAGE.findall(body))
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{contents}\n```\n"
    elif page.startswith(("results/", "decisions/")) and not page.endswith("README"):
        text = f"---\norphan: true\n---\n{text}"  # found from its README, not in the sidebar
    source[0] = CODE.sub(
        lambda link: f"{{py:obj}}`{link[1]} <{link[2].replace('/', '.')}.{link[1]}>`", text
    )


def keep_formulas(*event: list[str]) -> None:
    """Show the indented lines of a docstring as they are written."""
    lines = event[-1]
    lines[:] = re.sub(r"\n\n(?=    \S)", "\n\n::\n\n", "\n".join(lines)).split("\n")


def draw_formula(writer: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula, and its number in the paper."""
    block = isinstance(node, nodes.math_block)
    formula, _, number = node.astext().partition(r"\tag")
    drawn = tex2mathml(formula.strip(), as_block=block)
    if block:
        eqno = f'<span class="eqno">({number.strip()[1:-1]})</span>' if number else ""
        drawn = f'<div class="math" style="padding: 0.6em 0">{eqno}{drawn}</div>'
    writer.body.append(drawn)
    raise nodes.SkipNode
