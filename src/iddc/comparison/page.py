"""The page of a comparison: the tables, and the same images by every method, in one file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from iddc import __version__
from iddc.comparison.table import LEGEND, Comparison
from iddc.runs import write_atomic

PAGE = "comparison.html"
"""The file in the folder of a comparison."""
PICTURES = "pictures"
"""The folder in it that has, for each method, images, labels and masks side by side."""
WIDTH = 280
"""The width of a picture in the page, in pixels."""


@dataclass(frozen=True)
class Picture:
    """A picture in a row of the page."""

    title: str
    address: str
    """The picture itself, as a data: address."""


def write_page(comparison: Comparison, names: Sequence[tuple[int, str]], out: Path) -> None:
    """Write one file that needs nothing else.

    Clusters have the colour of the class they are matched to, so that one colour means the same in
    every column; clusters without a class are grey.

    Args:
        comparison: The numbers.
        names: The places and names of the images that are shown.
        out: The folder of the comparison.
    """
    loaders = [PackageLoader("iddc.comparison", "template"), PackageLoader("iddc.report", "page")]
    environment = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("comparison.html").render(
        version=__version__,
        title=comparison.title,
        legend=LEGEND,
        tables=[("Scores", *comparison.table()), ("IoU of each class (%)", *comparison.classes())],
        failures=comparison.failures,
        rows=[(name, _row(comparison.methods, name, out)) for _, name in names],
    )
    write_atomic(out / PAGE, text)


def _row(methods: Sequence[str], name: str, out: Path) -> list[Picture]:
    """An image, its label, and what each method makes of it."""
    found: list[Picture] = []
    for method in methods:
        file = (out / PICTURES / method / name).with_suffix(".png")
        with Image.open(file) as panel:
            third = panel.width // 3
            parts = [panel.crop((i * third, 0, (i + 1) * third, panel.height)) for i in range(3)]
        if not found:
            found += [Picture("image", _address(parts[0])), Picture("labels", _address(parts[1]))]
        found.append(Picture(method, _address(parts[2])))
    return found


def _address(picture: Image.Image) -> str:
    """A picture of bounded width as a data: address."""
    height = max(1, round(picture.height * WIDTH / picture.width))
    small = picture.convert("RGB").resize((WIDTH, height), Image.Resampling.BILINEAR)
    stream = BytesIO()
    small.save(stream, "WEBP", quality=80, method=4)
    return f"data:image/webp;base64,{b64encode(stream.getvalue()).decode()}"
