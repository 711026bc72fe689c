"""Make the pictures of docs/tutorial.md with its own commands.

    python docs/figures/tutorial.py CAMVID --work DIR

CAMVID holds train/images and val/images. The commands run in DIR; a finished training is kept. What
a cluster shows differs from model to model: look at clusters.jpg and samples.jpg of a first run,
write the names into the tutorial's `iddc label` line, and give the command again. Needs selenium,
chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from selenium import webdriver
from selenium.webdriver.common.by import By

from iddc import Segmenter

PAGE = Path(__file__).parents[1] / "tutorial.md"
PICTURES = Path(__file__).with_suffix("")
RUN, MASKS = Path("runs/camvid"), Path("masks")
WIDTH = 360
"""Of a frame in a picture, in pixels."""
HEIGHT = 1100
"""The most that is shown of a section."""
SECTIONS = ("samples", "clusters")
"""Of the report: each is a picture."""


def main() -> None:
    """Run the commands, then make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args()
    camvid = given.camvid.resolve(strict=True)
    given.work.mkdir(parents=True, exist_ok=True)
    os.chdir(given.work)
    if not Path("camvid").exists():
        Path("camvid").symlink_to(camvid)
    PICTURES.mkdir(exist_ok=True)
    (RUN / "labels.json").unlink(missing_ok=True)  # the report shows numbers
    shutil.rmtree(MASKS, ignore_errors=True)
    for command in commands():
        if command.startswith("iddc train") and (RUN / "model.json").exists():
            continue
        print(command, flush=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        subprocess.run(["bash", "-euc", command], env={**os.environ, "PATH": path}, check=True)
    photograph_report()
    draw_masks()


def commands() -> list[str]:
    """What stands in the blocks of the page that have no language."""
    blocks = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", PAGE.read_text(), re.MULTILINE)
    text = "".join(block for language, block in blocks if not language)
    return text.replace("\\\n", " ").splitlines()


def photograph_report() -> None:
    """Take a picture of each section."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{switch}")
    options.add_argument("--window-size=900,9000")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.get((RUN / "report.html").resolve().as_uri())
    for name in SECTIONS:
        picture = Image.open(io.BytesIO(browser.find_element(By.ID, name).screenshot_as_png))
        keep(picture.crop((0, 0, picture.width, min(picture.height, HEIGHT))), name)
    browser.quit()


def draw_masks() -> None:
    """Put the overlays into one picture, and the masks that CVAT reads into another."""
    with zipfile.ZipFile(MASKS / "cvat.zip") as archive:
        classes = Segmenter.load(RUN, device="cpu").labels.classes
        legend = zip(classes.names, map(tuple, classes.colours.tolist()), strict=True)
        overlays = [Image.open(path) for path in sorted((MASKS / "overlay").rglob("*.png"))]
        keep(sheet(overlays, legend), "predict")
        names = [name for name in archive.namelist() if "SegmentationClass/" in name]
        masks = [Image.open(archive.open(name)) for name in sorted(names)]
        lines = archive.read("labelmap.txt").decode().splitlines()
        fields = [line.split(":") for line in lines if not line.startswith("#")]
        known = [(name, tuple(map(int, colour.split(",")))) for name, colour, *_ in fields]
        keep(sheet(masks, known), "cvat")


def sheet(
    images: Iterable[Image.Image], legend: Iterable[tuple[str, tuple[int, ...]]]
) -> Image.Image:
    """Two images in a row, and below them the names of the colours."""
    tiles = [image.convert("RGB") for image in images]
    tiles = [tile.resize((WIDTH, WIDTH * tile.height // tile.width)) for tile in tiles]
    font, columns, line = ImageFont.load_default(15), 4, 24
    entries = list(legend)
    top = sum(tile.height for tile in tiles[::2])
    height = top + 8 + line * -(-len(entries) // columns)
    picture = Image.new("RGB", (2 * WIDTH, height), "white")
    draw = ImageDraw.Draw(picture)
    for place, tile in enumerate(tiles):
        picture.paste(tile, (place % 2 * WIDTH, place // 2 * tile.height))
    for place, (name, colour) in enumerate(entries):
        left, y = place % columns * 2 * WIDTH // columns + 6, top + 6 + place // columns * line
        draw.rectangle((left, y + 3, left + 14, y + 17), fill=colour, outline="grey")
        draw.text((left + 20, y), name, fill="black", font=font)
    return picture


def keep(picture: Image.Image, name: str) -> None:
    """Write a small file."""
    picture.convert("RGB").save(PICTURES / f"{name}.jpg", quality=85, subsampling=0)


if __name__ == "__main__":
    main()
