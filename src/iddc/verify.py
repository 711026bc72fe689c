"""Whether this machine computes what the paper and the protocols say: the product against twins.

Every twin is written plainly and in float64, by loops or by torch's own functions, and shares no
code with what it checks; that of the equations is `losses/reference.py`. Inputs are drawn, so no
download is needed. The device computes what it would compute in use: kernels, windows in strips,
counts of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, normalize

from iddc.backbones import untrained_backbone
from iddc.config import (
    Experiment,
    ObjectiveConfig,
    PredictionConfig,
    Regularizer,
    TrainingConfig,
)
from iddc.datasets import Sample
from iddc.evaluation import PROTOCOLS, EvalProtocol, evaluate
from iddc.losses import Objective, Pixels, Terms
from iddc.losses.reference import equation_8
from iddc.metrics import IGNORE, Confusion
from iddc.segmenter import Segmenter
from iddc.windows import predict_probs

EXACT, CLUSTERS, PATCH = 1e-6, 5, 16
"""The tolerance of probabilities; K and the patch of the network that is drawn."""
TIED = 1e-4
"""The share of pixels that single precision may decide otherwise where two clusters tie."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    size: str
    """How large the drawn input is."""
    difference: float
    """The largest found; relative for losses and gradients."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the tolerance."""
        return self.difference <= self.tolerance


def verify(device: torch.device, seed: int = 0) -> Iterator[Check]:
    """Compare one part after the other.

    Args:
        device: Where the product computes. The twins compute on the CPU.
        seed: Of what is drawn.
    """
    yield from check_equations(device, seed)
    yield from check_windows(device, seed)
    yield from check_protocols(device, seed)
    yield check_matching(seed)
    yield from check_positions(device, seed)


# Equations (1) to (8) -----------------------------------------------------------------------------


def check_equations(device: torch.device, seed: int) -> Iterator[Check]:
    """The loss of Eq. (8) and its gradient, for each penalty and each regulariser."""
    batch, pixels, width = 3, 60, 24
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, batch, pixels, CLUSTERS, generator=generator)
    drawn = normalize(torch.randn(2, batch, pixels, width, generator=generator) + 0.4, dim=-1)
    cases: list[tuple[str, ObjectiveConfig]] = [
        (f"Eq. (8), {penalty} penalty", ObjectiveConfig(penalty=penalty))
        for penalty in ("log", "linear", "exp")
    ]
    named: tuple[Regularizer, ...] = ("entropy", "weibull", "weibull-released")
    cases += [(f"Eq. (8), {name}", ObjectiveConfig(regularizer=name)) for name in named]
    cases.append(("Eq. (8), centred", ObjectiveConfig(centering="batch")))
    for name, config in cases:
        found, slope = _loss(drawn.to(device), logits.to(device), Objective(config))
        expected, exact = _loss(drawn.double(), logits.double(), partial(equation_8, config=config))
        size = f"{batch} x {pixels} pixels"
        yield Check(name, size, abs(found - expected) / max(abs(expected), 1e-9), 1e-5)
        worst = (slope - exact).abs().max() / exact.abs().max()
        yield Check(f"its gradient{name[7:]}", size, float(worst), 1e-4)


def _loss(
    embeddings: Float[Tensor, "2 b n d"],
    logits: Float[Tensor, "2 b n k"],
    objective: Callable[[Pixels, Pixels, Sequence[int]], Terms],
) -> tuple[float, Float64[Tensor, "2 b n k"]]:
    logits = logits.clone().requires_grad_()
    first, second = (Pixels(u, v) for u, v in zip(embeddings, logits.softmax(-1), strict=True))
    loss = objective(first, second, [1, 2]).total
    (slope,) = torch.autograd.grad(loss, logits)
    return float(loss.detach()), slope.cpu().double()


# Windows and protocols ----------------------------------------------------------------------------


class Drawn(nn.Module):
    """A network of no layers: each patch's mean colour, and where it lies, give its logits.

    They are computed in float64 on the CPU: what is checked is what comes after them.
    """

    num_clusters = CLUSTERS

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.randn(CLUSTERS, 3, generator=generator).double() * 12
        # A Segmenter computes where the parameters are.
        self.position = nn.Parameter(torch.zeros(1, device=device))

    def logits(self, images: UInt8[Tensor, "b 3 H W"]) -> Float64[Tensor, "b k h w"]:
        """The logits of every patch; windows and mirror images differ."""
        cells = avg_pool2d(images.cpu().double() / 255, PATCH) - 0.5
        logits = torch.einsum("bihw,ki->bkhw", cells, self.weights)
        logits[:, 0] += 2 * torch.arange(logits.shape[3]) / logits.shape[3]
        return logits

    def scores(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The same logits, as a `PixelPredictor` gives them."""
        return self.logits(images).float().to(self.position.device)

    def probs_of(self, scores: Float[Tensor, "k ..."]) -> Float[Tensor, "k ..."]:
        """The softmax of enlarged logits."""
        return scores.softmax(0)

    def probs(self, images: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """The softmax of every patch."""
        return self.logits(images).softmax(1).float().to(self.position.device)


def check_windows(device: torch.device, seed: int) -> Iterator[Check]:
    """The probabilities of a canvas, for each way to put windows together."""
    network, size = Drawn(device, seed), (333, 251)
    image = torch.from_numpy(_picture(*size, seed)).permute(2, 0, 1)
    for fields in (
        {"softmax": "pixels"},
        {"softmax": "patches"},
        {"softmax": "pixels", "blend": "tent"},
        {"softmax": "patches", "blend": "tent"},
        {"softmax": "pixels", "window": 0, "align_corners": True},
        {"softmax": "pixels", "window": 0},
    ):
        config = PredictionConfig.model_validate(fields)
        found = predict_probs(network, image, config, (size[1], size[0]), device=device)
        expected = _slow_canvas(network, image, config)
        words = ", ".join(f"{name} {value}" for name, value in fields.items())
        worst = (found.cpu().double() - expected).abs().max()
        yield Check(f"windows: {words}", f"{size[0]} x {size[1]}", float(worst), EXACT)


def _slow_canvas(
    network: Drawn, image: UInt8[Tensor, "3 H W"], config: PredictionConfig
) -> Float64[Tensor, "k H W"]:
    """Window by window, mirror by mirror, all pixels at once, in float64 on the CPU."""
    _, height, width = image.shape
    canvas = torch.zeros(CLUSTERS, height, width, dtype=torch.float64)
    total = torch.zeros(height, width, dtype=torch.float64)
    for top in _starts(height, config):
        for left in _starts(width, config):
            side = config.window or max(height, width)
            crop = image[:, top : top + side, left : left + side]
            rows, columns = crop.shape[1:]
            both = []
            for mirrored in (False, True) if config.flip else (False,):
                grid = network.logits((crop.flip(2) if mirrored else crop)[None])
                grid = grid.softmax(1) if config.softmax == "patches" else grid
                wide = interpolate(
                    grid, (rows, columns), mode="bilinear", align_corners=config.align_corners
                )[0]
                both.append(wide.flip(2) if mirrored else wide)
            mean = torch.stack(both).mean(0)
            probs = mean if config.softmax == "patches" else mean.softmax(0)
            weight = torch.ones(rows, columns, dtype=torch.float64)
            if config.blend == "tent":
                weight = torch.outer(_tent(rows), _tent(columns))
            canvas[:, top : top + rows, left : left + columns] += probs * weight
            total[top : top + rows, left : left + columns] += weight
    return canvas / total


def _starts(length: int, config: PredictionConfig) -> list[int]:
    if not config.window or length <= config.window:
        return [0]
    stride = config.window - config.overlap
    count = math.ceil((length - config.window) / stride) + 1
    return [min(i * stride, length - config.window) for i in range(count)]


def _tent(length: int) -> Float64[Tensor, " n"]:
    return torch.tensor([min(i + 1, length - i) for i in range(length)], dtype=torch.float64)


@dataclass
class _OneImage:
    """A labelled data set of one drawn image."""

    sample: Sample
    num_classes: int = 3
    name: str = "drawn"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Numbers will do."""
        return tuple(map(str, range(self.num_classes)))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return self.sample


def check_protocols(device: torch.device, seed: int) -> Iterator[Check]:
    """The confusion of each protocol: the share of pixels that were counted otherwise."""
    size = (361, 301)
    image = _picture(*size, seed)
    label = image.argmax(2).astype(np.uint8)
    label[: size[1] // 6, : size[0] // 5] = IGNORE
    dataset = _OneImage(Sample(Image.fromarray(image), label, "drawn"))
    network = Drawn(device, seed)
    segmenter = Segmenter.of(network, Experiment(training=TrainingConfig(precision="fp32")))
    for name, protocol in PROTOCOLS.items():
        found = evaluate(segmenter, dataset, protocol).confusion.counts
        expected = _slow_counts(network, image, label, protocol)
        wrong = np.abs(found - expected).sum() / 2 / expected.sum()
        yield Check(f"protocol {name}", f"{size[0]} x {size[1]}", float(wrong), TIED)


def _slow_counts(
    network: Drawn,
    image: UInt8[np.ndarray, "H W 3"],
    label: UInt8[np.ndarray, "H W"],
    protocol: EvalProtocol,
) -> Int64[np.ndarray, "k c"]:
    picture, shown = Image.fromarray(image), Image.fromarray(label)
    if protocol.resize != "none":
        width, height = picture.size
        scale = 320 / min(width, height)
        size = (320, 320)
        if protocol.resize == "shorter side":
            size = (int(width * scale), int(height * scale))
        nearest = protocol.image_filter == "nearest"
        rule = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
        picture, shown = picture.resize(size, rule), shown.resize(size, Image.Resampling.NEAREST)
        left, top = round((size[0] - 320) / 2), round((size[1] - 320) / 2)
        box = (left, top, left + 320, top + 320)
        picture, shown = picture.crop(box), shown.crop(box)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    ids = _slow_canvas(network, pixels, protocol.prediction).argmax(0)
    truth = torch.from_numpy(np.array(shown)).long()
    if protocol.scored_at == "square":
        ids, truth = (
            interpolate(each[None, None].float(), (320, 320), mode="nearest")[0, 0].long()
            for each in (ids, truth)
        )
    counts = np.zeros((CLUSTERS, 3), np.int64)
    for cluster in range(CLUSTERS):
        for kind in range(3):
            counts[cluster, kind] = int(((ids == cluster) & (truth == kind)).sum())
    return counts


def check_matching(seed: int) -> Check:
    """The matched pixels of confusions, against all assignments of clusters to classes."""
    rng, worst = np.random.default_rng(seed), 0.0
    for _ in range(20):
        counts = rng.integers(0, 100, (5, 5))
        found = Confusion(counts).scores().accuracy
        best = max(
            sum(int(counts[k, c]) for k, c in enumerate(order)) for order in permutations(range(5))
        )
        worst = max(worst, abs(found - best / counts.sum()))
    return Check("matching: accuracy of the best", "20 tables of 5 x 5", worst, 1e-12)


# Positions ----------------------------------------------------------------------------------------


def check_positions(device: torch.device, seed: int) -> Iterator[Check]:
    """A small ViT away from the size it learned, against one that was built for that size."""
    import timm

    options: dict[str, Any] = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = untrained_backbone("vit_tiny_patch16_224", options=options, positions="dino")
        state = {
            name: value + torch.randn_like(value) * 0.2
            for name, value in backbone.net.state_dict().items()
        }
    backbone.net.load_state_dict(state)
    grid = (20, 17)
    learned = state["pos_embed"][0, 1:].double().reshape(14, 14, -1).numpy()
    rows = _slow_cubic(learned, grid[0])
    cells = _slow_cubic(rows.transpose(1, 0, 2), grid[1]).transpose(1, 0, 2)
    size = (grid[0] * 16, grid[1] * 16)
    fixed = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, global_pool="", img_size=size, **options
    ).eval()
    flat = torch.from_numpy(cells).float().reshape(1, grid[0] * grid[1], -1)
    fixed.load_state_dict({**state, "pos_embed": torch.cat([state["pos_embed"][:, :1], flat], 1)})
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = backbone.eval().to(device)(image.to(device)).cpu()
        vit: Any = fixed
        pixels = (image - backbone.mean.cpu()) / backbone.std.cpu()
        tokens = vit.forward_features(pixels)[:, 1:]
    expected = tokens.transpose(1, 2).reshape(found.shape)
    worst = (found - expected).abs().max() / expected.abs().max()
    yield Check("positions of DINO", f"{size[1]} x {size[0]}", float(worst), 1e-3)


def _slow_cubic(values: Float64[np.ndarray, "n ..."], length: int) -> Float64[np.ndarray, "m ..."]:
    """Keys' kernel of a = -0.75 along the first axis, with DINO's offset of 0.1."""

    def kernel(x: float) -> float:
        x = abs(x)
        near = 1.25 * x**3 - 2.25 * x**2 + 1
        far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        return near if x <= 1 else far if x < 2 else 0.0

    side, lines = len(values), []
    for i in range(length):
        source = (i + 0.5) * side / (length + 0.1) - 0.5
        low = math.floor(source)
        taps = range(low - 1, low + 3)
        lines.append(sum(kernel(source - j) * values[min(max(j, 0), side - 1)] for j in taps))
    return np.stack(lines)


def _picture(width: int, height: int, seed: int) -> UInt8[np.ndarray, "H W 3"]:
    """Smooth blobs of colour under noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    picture: np.ndarray = np.clip(np.asarray(smooth).astype(int) + noise, 0, 255).astype(np.uint8)
    return picture


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those whose difference is above the tolerance."""
    return [check for check in checks if not check.passed]
