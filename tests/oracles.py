"""Every equation of the paper as plain loops, Eqs. (1)-(8), to be read beside Sec. 3.

Nothing here is fast, vectorised or shared with the package: a second witness. A crop is a list of
images, an image a list of pixels, a pixel a list of numbers: `u[i][p]` is the embedding and
`v[i][p]` the cluster probabilities of pixel p of image i. `_plus` and `_minus` mark the other side
of a positive and of a negative pair. Where the paper leaves a gap, the function says what fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from iddc.config import ObjectiveConfig

Crop = Sequence[Sequence[Sequence[float]]]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def w_plus(affinity: float, t_plus: float, weighted: bool) -> float:
    """w+ of Eq. (1) for a selected pair; without weights it is 1 (Table 5)."""
    assert affinity > t_plus
    return affinity if weighted else 1.0


def w_minus(affinity: float, t_minus: float, form: str) -> float:
    """w- of Eq. (2) for a selected pair: as printed, as released, or 1 (Table 5)."""
    assert affinity < t_minus
    return {"paper": 1 - affinity, "released": 1 - max(affinity, 0.0), "off": 1.0}[form]


def equation_1(
    u: Crop,
    v: Crop,
    u_plus: Crop,
    v_plus: Crop,
    *,
    t_plus: float,
    h: str,
    weighted: bool = True,
    offset: float = 1e-6,
) -> float:
    """L+. N+ counts the pairs of all images together; an empty selection gives 0."""
    total, n_plus = 0.0, 0
    for image in range(len(u)):
        for i in range(len(u[image])):
            for j in range(len(u_plus[image])):
                affinity = dot(u[image][i], u_plus[image][j])
                if affinity > t_plus:
                    agreement = dot(v[image][i], v_plus[image][j])
                    total += w_plus(affinity, t_plus, weighted) * H_PLUS[h](agreement, offset)
                    n_plus += 1
    return total / n_plus if n_plus else 0.0


def equation_2(
    u: Crop,
    v: Crop,
    u_minus: Crop,
    v_minus: Crop,
    *,
    t_minus: float,
    h: str,
    form: str = "paper",
    offset: float = 1e-6,
) -> float:
    """L- between image i of one list and image i of the other; an empty selection gives 0."""
    total, n_minus = 0.0, 0
    for image in range(len(u)):
        for i in range(len(u[image])):
            for j in range(len(u_minus[image])):
                affinity = dot(u[image][i], u_minus[image][j])
                if affinity < t_minus:
                    agreement = dot(v[image][i], v_minus[image][j])
                    total += w_minus(affinity, t_minus, form) * H_MINUS[h](agreement, offset)
                    n_minus += 1
    return total / n_minus if n_minus else 0.0


def equation_3_plus(s: float, offset: float) -> float:
    """Log. The paper lets it be infinite at 0; the argument is kept at or above `offset`."""
    return -log(max(s, offset))


def equation_3_minus(s: float, offset: float) -> float:
    return -log(max(1 - s, offset))


def equation_4_plus(s: float, offset: float) -> float:
    return 1 - s


def equation_4_minus(s: float, offset: float) -> float:
    return s


def equation_5_plus(s: float, offset: float) -> float:
    return exp(1 - s)


def equation_5_minus(s: float, offset: float) -> float:
    return exp(s)


H_PLUS = {"log": equation_3_plus, "linear": equation_4_plus, "exp": equation_5_plus}
H_MINUS = {"log": equation_3_minus, "linear": equation_4_minus, "exp": equation_5_minus}


def frequencies(*crops: Crop) -> list[float]:
    """p_c of Eq. (6): the mean of v over every pixel of every image of the given crops."""
    num_clusters = len(crops[0][0][0])
    p, count = [0.0] * num_clusters, 0
    for crop in crops:
        for image in crop:
            for pixel in image:
                count += 1
                for c in range(num_clusters):
                    p[c] += pixel[c]
    return [x / count for x in p]


def equation_6(p: Sequence[float], config: ObjectiveConfig) -> float:
    """Entropy (its negative, as printed), with 0 log 0 = 0."""
    total = 0.0
    for p_c in p:
        total += p_c * log(max(p_c, config.log_offset))
    return total


def equation_7(p: Sequence[float], config: ObjectiveConfig) -> float:
    """Weibull as printed: a sum over clusters. The offset keeps an empty cluster finite."""
    k, total = config.weibull_shape, 0.0
    for p_c in p:
        x = p_c + config.weibull_offset
        total += k * x ** (k - 1) * exp(-(x**k))
    return total


def equation_7_released(p: Sequence[float], config: ObjectiveConfig) -> float:
    """Weibull as in the authors' release: relative to the largest cluster, scaled, a mean."""
    k, scale, total = config.weibull_shape, config.weibull_scale, 0.0
    for p_c in p:
        x = p_c / max(p) + config.weibull_offset
        total += (k / scale) * (x / scale) ** (k - 1) * exp(-((x / scale) ** k))
    return total / len(p) / config.weibull_divisor


REGULARIZERS: dict[str, Callable[[Sequence[float], ObjectiveConfig], float]] = {
    "none": lambda p, config: 0.0,
    "entropy": equation_6,
    "weibull": equation_7,
    "weibull-released": equation_7_released,
}


class Terms(NamedTuple):
    positive: float
    negative: float
    regularizer: float
    total: float


def equation_8(
    u: Crop,
    v: Crop,
    u_plus: Crop,
    v_plus: Crop,
    rolls: Sequence[int],
    config: ObjectiveConfig,
) -> Terms:
    """L. The negatives of image i are the images i - r; each roll r has its own mean."""
    if config.centering == "batch":
        u, u_plus = centred(u, u_plus)
    h, offset = config.penalty, config.log_offset
    positive = negative = regularizer = 0.0
    if config.positive_weight:
        positive = equation_1(
            u,
            v,
            u_plus,
            v_plus,
            t_plus=config.positive_threshold,
            h=h,
            weighted=config.positive_affinity,
            offset=offset,
        )
    if config.negative_weight:
        others_u, others_v = (u, v) if config.negative_crops == "first" else (u_plus, v_plus)
        for r in rolls:
            negative += equation_2(
                u,
                v,
                [others_u[i - r] for i in range(len(u))],
                [others_v[i - r] for i in range(len(u))],
                t_minus=config.negative_threshold,
                h=h,
                form=config.negative_affinity,
                offset=offset,
            ) / len(rolls)
    if config.regularizer_weight:
        p = frequencies(v) if config.regularizer_crops == "first" else frequencies(v, v_plus)
        regularizer = REGULARIZERS[config.regularizer](p, config)
    total = (
        config.positive_weight * positive
        + config.negative_weight * negative
        + config.regularizer_weight * regularizer
    )
    return Terms(positive, negative, regularizer, total)


def centred(*crops: Crop) -> list[Crop]:
    """The embeddings less their mean over all crops, images and pixels, at length 1 again."""
    mean = frequencies(*crops)
    result: list[Crop] = []
    for crop in crops:
        images = []
        for image in crop:
            pixels = []
            for pixel in image:
                difference = [x - m for x, m in zip(pixel, mean, strict=True)]
                length = sqrt(dot(difference, difference))
                pixels.append([x / length for x in difference])
            images.append(pixels)
        result.append(images)
    return result


def slopes(
    function: Callable[[Crop], float], crop: Sequence[Sequence[Sequence[float]]], step: float = 1e-6
) -> list[list[list[float]]]:
    """The gradient of `function` at `crop` by central differences, one number at a time."""
    moved = [[list(pixel) for pixel in image] for image in crop]
    gradient = [[[0.0] * len(pixel) for pixel in image] for image in crop]
    for i, image in enumerate(crop):
        for p, pixel in enumerate(image):
            for c, value in enumerate(pixel):
                moved[i][p][c] = value + step
                above = function(moved)
                moved[i][p][c] = value - step
                below = function(moved)
                moved[i][p][c] = value
                gradient[i][p][c] = (above - below) / (2 * step)
    return gradient


def waves(start: float, *shape: int) -> Tensor:
    """sin(start), sin(start + 1), ... in double precision and this shape: inputs of oracles."""
    return (start + torch.arange(prod(shape), dtype=torch.float64)).sin().view(shape)
