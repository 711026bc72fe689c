"""Street scenes drawn by a program, with exact labels: for `iddc demo` and for tests.

A pinhole camera looks down a street: walls, ground and cars are placed in metres and projected, so
that texture, size and position behave as in photos, and the shares of the classes differ strongly.
Ten colour themes make colour alone a poor guide: the sky of one is the road of another.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("sky", "building", "road", "pavement", "tree", "car")
SKY, BUILDING, ROAD, PAVEMENT, TREE, CAR = range(len(CLASSES))
VALIDATION_SHARE = 0.2
"""The share of `write_scenes` that goes to val/, at least one scene."""

Colour = tuple[int, int, int]
Point = tuple[float, float, float]
"""Metres to the right, above the ground and ahead."""


class Theme(NamedTuple):
    """The colours of a place and a time of day."""

    zenith: Colour
    horizon: Colour
    road: Colour
    pavement: Colour
    facades: tuple[Colour, ...]
    leaves: tuple[Colour, ...]


THEMES = {
    "noon": Theme(
        (70, 130, 215), (190, 215, 240), (95, 95, 100), (170, 165, 160),
        ((170, 90, 70), (205, 190, 165), (150, 150, 155)), ((60, 110, 45), (85, 130, 60)),
    ),
    "overcast": Theme(
        (165, 170, 175), (205, 208, 210), (80, 82, 85), (135, 133, 130),
        ((140, 80, 65), (175, 170, 160), (110, 105, 100)), ((60, 85, 55), (75, 95, 60)),
    ),
    "dusk": Theme(
        (60, 65, 120), (245, 165, 105), (70, 60, 75), (105, 90, 95),
        ((110, 70, 75), (150, 105, 90), (85, 70, 95)), ((45, 60, 50), (70, 65, 45)),
    ),
    "night": Theme(
        (12, 15, 35), (45, 45, 75), (45, 45, 55), (70, 68, 72),
        ((60, 50, 55), (45, 50, 65), (75, 65, 55)), ((20, 40, 30), (30, 45, 30)),
    ),
    "autumn": Theme(
        (120, 160, 205), (215, 220, 220), (100, 92, 88), (165, 145, 115),
        ((160, 110, 80), (190, 170, 140), (125, 85, 70)), ((200, 120, 35), (170, 70, 35)),
    ),
    "desert": Theme(
        (130, 175, 205), (235, 215, 175), (175, 150, 120), (210, 185, 145),
        ((205, 165, 115), (225, 195, 150), (185, 135, 95)), ((110, 120, 60), (140, 135, 80)),
    ),
    "snow": Theme(
        (175, 190, 205), (225, 230, 235), (165, 170, 178), (228, 232, 238),
        ((150, 85, 75), (195, 190, 180), (120, 125, 135)), ((75, 90, 80), (195, 205, 210)),
    ),
    "rain": Theme(
        (95, 105, 115), (140, 148, 155), (50, 56, 64), (85, 92, 98),
        ((105, 75, 70), (120, 125, 125), (80, 88, 98)), ((40, 70, 50), (55, 80, 60)),
    ),
    "spring": Theme(
        (105, 165, 230), (220, 230, 245), (120, 115, 115), (190, 180, 170),
        ((225, 205, 180), (200, 150, 130), (180, 190, 200)), ((235, 175, 195), (120, 160, 75)),
    ),
    "terracotta": Theme(
        (150, 190, 225), (240, 225, 205), (135, 105, 90), (185, 140, 115),
        ((120, 130, 140), (160, 165, 165), (95, 110, 105)), ((65, 95, 65), (95, 115, 70)),
    ),
}  # fmt: skip
_CAR_COLOURS: tuple[Colour, ...] = (
    (190, 30, 35), (30, 60, 150), (225, 225, 225), (30, 30, 35), (150, 155, 160),
    (215, 180, 50), (40, 105, 70), (120, 60, 30), (90, 150, 200),
)  # fmt: skip
_EYE = 1.6
"""The camera's height above the ground, in metres."""
_FAR = 90.0
"""Where the walls of the street end, in metres."""


class Camera(NamedTuple):
    """A pinhole camera at (0, eye, 0) that looks along the street."""

    centre: tuple[float, float]
    focal: float

    def project(self, x: float, height: float, z: float) -> tuple[float, float]:
        """Give the pixel of a point x metres to the right, above the ground, z metres ahead."""
        scale = self.focal / z
        return self.centre[0] + x * scale, self.centre[1] + (_EYE - height) * scale


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int] = (320, 240)
) -> tuple[UInt8[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """Draw one street and its class ids, indices of `CLASSES`.

    Args:
        rng: Everything random comes from it.
        size: Width and height in pixels, at least 32 each.
    """
    width, height = size
    theme = list(THEMES.values())[rng.integers(len(THEMES))]
    camera = Camera(
        (width * rng.uniform(0.35, 0.65), height * rng.uniform(0.42, 0.54)),
        width * rng.uniform(0.6, 0.85),
    )
    half_road, half_street = rng.uniform(3.2, 5.0), rng.uniform(6.0, 9.0)
    noise = rng.random((256, 256), dtype=np.float32) - 0.5
    colours, label = _draw_sky(rng, theme, camera, size)
    _draw_ground(rng, theme, camera, half_road, noise, colours, label)
    for side in (-1, 1):
        _draw_walls(rng, theme, camera, side * half_street, noise, colours, label)
    image = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    classes = Image.fromarray(label)
    things = [
        (z, "tree", rng.choice((-1, 1)) * rng.uniform(half_road + 0.6, half_street))
        for z in rng.uniform(7, 60, size=rng.integers(1, 7))
    ]
    lanes = (-half_road + 1.1, -half_road / 3, half_road / 3, half_road - 1.1)
    for lane in lanes:
        z = rng.uniform(5, 25)
        while z < 60:
            if rng.random() < 0.4:
                things.append((z, "car", lane + rng.uniform(-0.1, 0.1)))
            z += rng.uniform(6, 20)
    for z, kind, x in sorted(things, reverse=True):  # the nearest last, over the others
        draw = _draw_tree if kind == "tree" else _draw_car
        draw(rng, theme, camera, float(x), float(z), image, classes)
    image = image.filter(ImageFilter.BoxBlur(size[0] / 640))
    light = (rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, size=3)).astype(np.float32)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * 3
    pixels = np.clip(np.asarray(image) * light + grain, 0, 255).astype(np.uint8)
    return pixels, np.array(classes)


def write_scenes(folder: Path, count: int, seed: int, size: tuple[int, int] = (320, 240)) -> None:
    """Write `count` scenes as a `folder` data set with train/, val/ and classes.txt.

    Scene i depends on (seed, i) alone. Existing files of the same names are replaced.

    Args:
        folder: Where to write; made if it is not there.
        count: How many scenes, at least 2; a fifth of them go to val/.
        seed: Everything random follows from it.
        size: Width and height of a scene in pixels.
    """
    num_val = max(1, round(count * VALIDATION_SHARE))
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for index in range(count):
        image, label = draw_scene(np.random.default_rng((seed, index)), size)
        part = folder / ("val" if index >= count - num_val else "train")
        Image.fromarray(image).save(part / "images" / f"scene_{index:05}.jpg", quality=92)
        # Level 1: labels shrink to a few kB anyway, and level 6 takes as long as drawing.
        Image.fromarray(label).save(part / "labels" / f"scene_{index:05}.png", compress_level=1)


def _rgb(colour: Colour) -> Float[np.ndarray, "3"]:
    return np.array(colour, np.float32)


def _smooth(
    rng: np.random.Generator, size: tuple[int, int], cells: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Random values in [0, 1] that vary over `cells` steps across and down."""
    small = Image.fromarray(rng.integers(0, 256, size=cells[::-1], dtype=np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32) / 255


def _draw_sky(
    rng: np.random.Generator, theme: Theme, camera: Camera, size: tuple[int, int]
) -> tuple[Float[np.ndarray, "H W 3"], UInt8[np.ndarray, "H W"]]:
    """Fill the picture with sky and clouds, and the end of the street with a far skyline."""
    width, height = size
    colours = np.zeros((height, width, 3), np.float32)
    label = np.full((height, width), SKY, np.uint8)
    above = int(camera.centre[1]) + 1
    rows = np.arange(above, dtype=np.float32)[:, None]
    share = (rows / above)[..., None]
    sky = _rgb(theme.zenith) * (1 - share) + _rgb(theme.horizon) * share
    clouds = 0.65 * _smooth(rng, (width, above), (4, 4)) + 0.35 * _smooth(
        rng, (width, above), (11, 9)
    )
    cover = np.clip((clouds - rng.uniform(0.4, 0.75)) * 4, 0, 0.85)[..., None].astype(np.float32)
    cloud = 0.6 * _rgb(theme.horizon) + 0.4 * max(theme.horizon)
    colours[:above] = sky * (1 - cover) + cloud * cover
    steps = rng.uniform(0.01, 0.12, size=max(4, width // 12)) * height
    skyline = camera.centre[1] - np.repeat(steps, -(-width // len(steps)))[:width]
    far = rows > skyline
    colours[:above][far] = 0.5 * _rgb(theme.facades[0]) + 0.5 * _rgb(theme.horizon)
    label[:above][far] = BUILDING
    return colours, label


def _draw_ground(
    rng: np.random.Generator,
    theme: Theme,
    camera: Camera,
    half_road: float,
    noise: Float[np.ndarray, "256 256"],
    colours: Float[np.ndarray, "H W 3"],
    label: UInt8[np.ndarray, "H W"],
) -> None:
    """Draw asphalt with lane marks, and pavement of slabs on both sides."""
    height, width = label.shape
    top = int(camera.centre[1]) + 1
    depth = (
        camera.focal * _EYE / (np.arange(top, height, dtype=np.float32)[:, None] - camera.centre[1])
    )
    z = np.broadcast_to(depth, (height - top, width))
    x = (np.arange(width, dtype=np.float32) - camera.centre[0]) * z / camera.focal
    fade = np.clip(12 / z, 0, 1)  # details blur with distance
    grain = noise[(x * 24).astype(int) & 255, (z * 24).astype(int) & 255]
    stains = _smooth(rng, (width, height - top), (6, 5)) - 0.5
    road = np.abs(x) < half_road
    light = np.where(road, 1 + 0.45 * grain * fade + 0.2 * stains, 1 + 0.15 * grain)
    slab = rng.uniform(0.6, 1.2)
    joint = ((x / slab) % 1 < 0.09) | ((z / slab) % 1 < 0.09)
    light = np.where(~road & joint, light * (1 - 0.4 * fade), light)
    ground = np.where(road[..., None], _rgb(theme.road), _rgb(theme.pavement))
    ground = ground * light[..., None]
    kerb = np.abs(np.abs(x) - half_road) < 0.12
    ground[kerb] = _rgb(theme.pavement) * 0.75
    line = (np.abs(x) < 0.08) & (z % 6 < 3)
    line |= np.abs(np.abs(x) - half_road + 2.3) < 0.06
    start = rng.uniform(6, 60)
    line |= (z > start) & (z < start + 3) & (x % 1.1 < 0.55) & road  # a crossing
    paint = np.float32(max(theme.road) * 0.5 + 125) * (1 + 0.2 * grain)
    ground[line] = paint[line][:, None]
    colours[top:] = ground
    label[top:] = np.where(road, ROAD, PAVEMENT)


def _draw_walls(
    rng: np.random.Generator,
    theme: Theme,
    camera: Camera,
    wall: float,
    noise: Float[np.ndarray, "256 256"],
    colours: Float[np.ndarray, "H W 3"],
    label: UInt8[np.ndarray, "H W"],
) -> None:
    """Draw the row of houses along x = wall, some of them missing."""
    height, width = label.shape
    ends = np.cumsum(rng.uniform(6, 16, size=16))
    count = len(ends) + 1
    roof = rng.uniform(5, 17, size=count).astype(np.float32) * (rng.random(count) > 0.15)
    storey = rng.uniform(2.6, 3.6, size=count).astype(np.float32)
    bay = rng.uniform(1.4, 3.5, size=count).astype(np.float32)
    pane = rng.uniform(0.3, 0.7, size=(2, count)).astype(np.float32)
    brick = rng.choice([0.1, 0.2, 0.35], size=count).astype(np.float32)
    paint = np.array(theme.facades, np.float32)[rng.integers(len(theme.facades), size=count)]
    paint = paint * rng.uniform(0.75, 1.2, size=(count, 1)).astype(np.float32)
    shade = np.float32(rng.uniform(0.7, 1.0))

    columns = np.arange(width, dtype=np.float32) - camera.centre[0]
    rows = np.arange(height, dtype=np.float32)[:, None] - camera.centre[1]
    with np.errstate(divide="ignore"):
        depth = (camera.focal * wall / columns).astype(np.float32)
    visible = (depth > 0) & (depth < _FAR)
    tops = np.where(visible, roof[np.searchsorted(ends, depth)], 0)
    above = _EYE - rows * np.where(visible, depth, 0) / camera.focal
    inside = np.nonzero((above > 0) & (above < tops))

    z, y = depth[inside[1]], above[inside].astype(np.float32)
    house = np.searchsorted(ends, z)
    fade = np.clip(20 / z, 0, 1)  # details blur with distance
    across, up = z / bay[house], y / storey[house]
    window = np.abs(across % 1 - 0.5) < pane[0, house] / 2
    window &= np.abs(up % 1 - 0.5) < pane[1, house] / 2
    window &= y < roof[house] - 0.5
    lit = noise[(across.astype(int) * 7) & 255, (up.astype(int) * 13) & 255] > 0.3
    grain = noise[(z * 16).astype(int) & 255, (y * 16).astype(int) & 255]
    courses = (y * 4 % 1 < 0.3) * brick[house]
    light = (1 + (0.5 * grain - courses) * fade) * shade
    light *= 1 - 0.4 * (y > roof[house] - 0.35)  # the eaves
    glass = 0.35 * _rgb(theme.zenith) + 25 + lit[:, None] * _rgb((90, 75, 40))
    facade = np.where(window[:, None], glass, paint[house] * light[:, None])
    haze = (z / _FAR / 2)[:, None]
    colours[inside] = facade * (1 - haze) + _rgb(theme.horizon) * haze
    label[inside] = BUILDING


def _draw_tree(
    rng: np.random.Generator,
    theme: Theme,
    camera: Camera,
    x: float,
    z: float,
    image: Image.Image,
    classes: Image.Image,
) -> None:
    """Draw a trunk and a crown of overlapping lobes with a ragged edge."""
    trunk, radius = rng.uniform(1.6, 2.6), rng.uniform(1.2, 2.4)
    scale = camera.focal / z
    left, top = camera.project(x - 1.4 * radius, trunk + 2.2 * radius, z)
    right, bottom = camera.project(x + 1.4 * radius, 0.0, z)
    width, height = max(2, round(right - left)), max(2, round(bottom - top))
    down, across = np.mgrid[:height, :width].astype(np.float32) / scale
    across = across - 1.4 * radius
    crown = np.zeros((height, width), bool)
    edge = rng.random((height, width), dtype=np.float32)
    for _ in range(7):
        lobe = rng.uniform(0.45, 0.75) * radius
        a, b = rng.uniform(-0.65, 0.65) * radius, rng.uniform(0.6, 1.6) * radius
        crown |= (across - a) ** 2 + (down - b) ** 2 < (lobe * (0.8 + 0.4 * edge)) ** 2
    stem = (np.abs(across) < 0.13) & (down > radius)
    leaf = _rgb(theme.leaves[rng.integers(len(theme.leaves))])
    clumps = _smooth(rng, (width, height), (max(2, width // 5), max(2, height // 5)))
    light = 0.35 + 0.65 * clumps + 0.6 * (edge - 0.5) + 0.25 * (1 - down / (2.2 * radius))
    bark = _rgb((75, 58, 45)) * (0.8 + 0.4 * edge[..., None])
    pixels = np.where(crown[..., None], leaf * light[..., None], bark)
    mask = Image.fromarray(((crown | stem) * 255).astype(np.uint8))
    corner = (round(left), round(top))
    image.paste(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), corner, mask)
    classes.paste(TREE, (*corner, corner[0] + width, corner[1] + height), mask)


def _draw_car(
    rng: np.random.Generator,
    theme: Theme,
    camera: Camera,
    x: float,
    z: float,
    image: Image.Image,
    classes: Image.Image,
) -> None:
    """Draw a car, two boxes on wheels: its back right of the middle, its front left of it."""
    paint = _rgb(_CAR_COLOURS[rng.integers(len(_CAR_COLOURS))])
    paint = paint * (0.35 + 0.65 * max(theme.horizon) / 255)
    glass, tyre = _rgb((45, 45, 50)), _rgb((18, 18, 23))
    lamp = _rgb((200, 25, 20) if x > 0 else (250, 245, 215))
    half, length = rng.uniform(0.8, 0.95), rng.uniform(3.6, 4.6)
    waist, roof = rng.uniform(0.8, 1.0), rng.uniform(1.35, 1.7)
    left, right, far = x - half, x + half, z + length
    flank = right if x < 0 else left  # the side that faces the camera's axis
    inner = flank - 0.12 if x < 0 else flank + 0.12

    faces = [(_upright(end, end + 0.22, 0.0, 0.5, z), tyre) for end in (left, right - 0.22)]
    faces += [
        (_along(flank, 0.25, waist, z, far), paint * 0.7),
        (_flat(left, right, waist, z, far), paint * 1.15),
        (_upright(left, right, 0.25, waist, z), paint * 0.9),
    ]
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    for axle in (z + 0.7, far - 0.8):
        rim = np.stack([np.full(12, flank), 0.32 + 0.32 * np.sin(turn), axle + 0.32 * np.cos(turn)])
        faces.append((rim.T.tolist(), tyre))
    faces += [
        (_along(inner, waist, roof, z + 0.5, far - 1.1), glass * 1.3),
        (_flat(left + 0.12, right - 0.12, roof, z + 0.5, far - 1.1), paint * 1.15),
        (_upright(left + 0.12, right - 0.12, waist, roof, z + 0.5), glass),
    ]
    for end in (left, right - 0.3):
        faces.append((_upright(end, end + 0.3, waist - 0.3, waist - 0.12, z), lamp))

    canvas, labels = ImageDraw.Draw(image), ImageDraw.Draw(classes)
    shadow = [camera.project(*corner) for corner in _flat(left, right, 0.0, z, far)]
    canvas.polygon(shadow, fill=(28, 28, 33))
    for corners, colour in faces:
        points = [camera.project(*corner) for corner in corners]
        canvas.polygon(points, fill=tuple(int(value) for value in np.clip(colour, 0, 255)))
        labels.polygon(points, fill=CAR)


def _upright(left: float, right: float, low: float, high: float, z: float) -> list[Point]:
    """Give the corners of a plate that faces the camera."""
    return [(left, low, z), (right, low, z), (right, high, z), (left, high, z)]


def _along(x: float, low: float, high: float, near: float, far: float) -> list[Point]:
    """Give the corners of an upright plate along the street."""
    return [(x, low, near), (x, low, far), (x, high, far), (x, high, near)]


def _flat(left: float, right: float, height: float, near: float, far: float) -> list[Point]:
    """Give the corners of a level plate."""
    return [(left, height, near), (right, height, near), (right, height, far), (left, height, far)]
