"""Can everybody read the report and the page of `iddc label`? Contrast, by the rules of WCAG."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

STYLES = {"report": ("iddc.report", "style.css"), "label": ("iddc.labelling", "page.css")}
TEXT = {"ink", "soft", "quiet", "alarm"}
LINES = {"first", "second", "same", "other", "accent"}


def variables(page: str, scheme: str) -> dict[str, str]:
    """The colours that a style sheet names, in its light or its dark scheme."""
    package, name = STYLES[page]
    text = files(package).joinpath("page", name).read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    chosen = blocks[: 1 if scheme == "light" else 2]
    return {
        name: colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
        for block in chosen
        for name, colour in re.findall(r"--(\w+): (#\w+);", block)
    }


def contrast(first: str, second: str) -> float:
    """The contrast of two colours by WCAG 2.2, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in channels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_the_contrast_of_black_and_white_is_21() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", STYLES)
def test_text_has_a_contrast_of_four_and_a_half_and_lines_of_three(page: str, scheme: str) -> None:
    colours = variables(page, scheme)
    grounds = [colours[name] for name in ("paper", "raised", "ground", "sheet") if name in colours]
    assert len(grounds) == 2
    for names, least in ((TEXT, 4.5), (LINES, 3.0)):
        found = {
            name: min(contrast(colours[name], ground) for ground in grounds)
            for name in names & colours.keys()
        }
        assert found
        assert min(found.values()) >= least, found
