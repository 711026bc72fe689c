"""Labelled development sets, embedded once: recipes are then tried on them in seconds.

    pictures = load("idd-lite", "train", backbone="bundled", cache=Path("/tmp/cache"))
    val = load("idd-lite", "val", backbone="bundled", cache=Path("/tmp/cache"))
    result = score(val, lambda picture: probabilities of its patches, num_clusters)

Every image is embedded whole at working size, without windows, and its mirror image too. So the
scores are close to those of `iddc evaluate`, not equal to them. Labels are in `val` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from scipy.special import xlogy
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import normalize

from iddc.backbones import Backbone, load_backbone
from iddc.datasets import open_dataset
from iddc.device import autocast
from iddc.images import ImageFile, find_images, open_image
from iddc.metrics import Confusion
from iddc.regions import patch_colours
from iddc.windows import to_working_size

DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = {
    "idd-lite": Path("dev/idd-lite"),
    "labelmefacade": Path("dev/labelmefacade"),
    "digital-rock": Path("dev/digital-rock"),
    "camvid": Path("camvid"),
}
"""Folders of the sets, below --data. Recipes may be chosen by all of them but camvid."""
WINDOWS = (1, 3, 7)
"""Sides of the windows of appearance, in patches: 8, 24 and 56 pixels where a patch has 8."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image on the grid of patches, and its label if it may be scored."""

    features: Float[Tensor, "m d h w"]
    """Raw embeddings, half precision: of the image, and of its mirror image mirrored back."""
    appearance: Float[Tensor, "27 h w"]
    """Local means, deviations and gradients of grey and two colour differences, in [-1, 1]."""
    lab: Float[Tensor, "3 h w"]
    """The mean CIELAB colour of each patch: L in [0, 100]."""
    label: UInt8[np.ndarray, "H W"] | None
    """The class of each pixel, at the label's own size."""


@dataclass(frozen=True)
class Result:
    """What a set's val images say of a clustering."""

    accuracy: float
    miou: float
    entropy: float
    """The entropy of the clusters' sizes over log K: 1 for equal ones."""
    sizes: tuple[float, ...]
    """The share of the labelled pixels of each cluster, the largest first."""
    confusion: Confusion


@dataclass(frozen=True)
class Pictures:
    """The images of a split, and the names of the set's classes."""

    items: tuple[Picture, ...]
    classes: tuple[str, ...]
    files: tuple[ImageFile, ...] = ()
    """The files of the images; none for some of a split."""
    backbone: str = "bundled"
    """What embedded them, as for `iddc train`."""
    short_side: int = 448
    """Larger images were reduced to this shorter side."""

    def __len__(self) -> int:
        return len(self.items)

    def features(self) -> Float[Tensor, "n d"]:
        """The embeddings of all patches of all images, of length 1, one image after the other."""
        rows = [directions(picture).flatten(1).T for picture in self.items]
        return torch.cat(rows)


def directions(picture: Picture) -> Float[Tensor, "d h w"]:
    """The embeddings of an image, of length 1; the mean of the two where its mirror image is in."""
    return normalize(normalize(picture.features.float(), dim=1).mean(0), dim=0)


def load(
    name: str,
    split: str,
    *,
    backbone: str = "bundled",
    cache: Path,
    data: Path = DATA,
    short_side: int = 448,
) -> Pictures:
    """Embed a split, or read it from the cache.

    Args:
        name: A key of SETS.
        split: train, whose labels are never opened, or val.
        backbone: As for `iddc train`.
        cache: Where the embeddings are kept, under a digest of the weights: about 200 MB for each
            set and backbone.
        data: What holds the folders of SETS.
        short_side: Larger images are reduced to this shorter side.
    """
    key = f"{_weights(backbone)}-{short_side}-{data / SETS[name]}"
    label = backbone.strip("/").rpartition("/")[2].replace(":", "-")
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    file = cache / f"{name}-{split}-{label}-{short_side}-{digest}.pt"
    root = data / SETS[name]
    dataset = open_dataset("folder", root, "val")
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(_embed(root, split, backbone, short_side), part)
        part.rename(file)
    rows = torch.load(file, mmap=True, weights_only=True)
    labels = (
        [dataset[i].label for i in range(len(dataset))] if split == "val" else [None] * len(rows)
    )
    items = tuple(Picture(*row, label=label) for row, label in zip(rows, labels, strict=True))
    files = tuple(find_images(root / split / "images").files)
    return Pictures(items, tuple(dataset.class_names), files, backbone, short_side)


def _weights(backbone: str) -> str:
    """A digest of a backbone's weights, which may change under its name."""
    digest = hashlib.sha256()
    for tensor in load_backbone(backbone).state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _embed(root: Path, split: str, name: str, short_side: int) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    backbone = load_backbone(name)
    return [embed(backbone, image, short_side) for image in images_of(root, split, short_side)]


def images_of(root: Path, split: str, short_side: int, most: int = 0) -> Iterator[Image.Image]:
    """The images of a split, in order; with `most`, so many, evenly spaced."""
    if split == "val":
        dataset = open_dataset("folder", root, "val")
        yield from (dataset[i].image for i in spaced(len(dataset), most))
    else:
        files = find_images(root / split / "images").files
        yield from (open_image(files[i], short_side) for i in spaced(len(files), most))


def spaced(count: int, most: int) -> list[int]:
    """At most so many of the first `count` numbers, evenly spaced; 0: all of them."""
    kept = min(most or count, count)
    return [i * count // kept for i in range(kept)]


@torch.no_grad()
def embed(
    backbone: Backbone | Callable[[Tensor], Tensor],
    image: Image.Image,
    short_side: int,
    *,
    mirrored: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, appearance and colours of an image, as a `Picture` has them.

    Args:
        backbone: On the CPU, or another map from images to features.
        image: Of any size.
        short_side: A larger image is reduced to this shorter side.
        mirrored: Whether the mirror image is embedded too.
    """
    pixels = to_working_size(image, short_side, 0)[None]
    both = torch.cat([pixels, pixels.flip(-1)]) if mirrored else pixels
    with autocast(torch.device("cpu"), "auto"):
        features = backbone(both.contiguous(memory_format=torch.channels_last))
    features[1:] = features[1:].flip(-1)
    grid = features.shape[2:]
    colours = patch_colours(pixels[0], grid)
    return features.half(), appearance(pixels[0] / 255, grid).half(), colours.half()


def appearance(
    pixels: Float[Tensor, "3 H W"], grid: tuple[int, int], windows: Sequence[int] = WINDOWS
) -> Float[Tensor, "c h w"]:
    """What a patch looks like, without a network.

    For grey, red less green, and blue less the mean of both: the mean, the deviation and the root
    mean square of the gradient in windows around each patch.
    """
    red, green, blue = pixels
    channels = torch.stack([pixels.mean(0), red - green, blue - (red + green) / 2])
    down = functional.pad(channels.diff(dim=1), (0, 0, 0, 1))
    across = functional.pad(channels.diff(dim=2), (0, 1))
    energy = down.square() + across.square()
    cells = functional.adaptive_avg_pool2d(torch.cat([channels, channels.square(), energy]), grid)
    parts = []
    for window in windows:
        means = functional.avg_pool2d(cells, window, 1, window // 2, count_include_pad=False)
        mean, square, gradient = means.chunk(3)
        parts += [mean, (square - mean.square()).clamp(min=0).sqrt(), gradient.sqrt()]
    return torch.cat(parts)


def score(
    pictures: Pictures, probs: Callable[[Picture], Float[Tensor, "k h w"]], num_clusters: int
) -> Result:
    """Score a clustering on labelled images, at the labels' own size, by one matching for all.

    Args:
        pictures: A val split.
        probs: The probabilities of an image's clusters on a grid of any size.
        num_clusters: K.
    """
    confusion = Confusion.zeros(num_clusters, len(pictures.classes))
    for picture in pictures.items:
        assert picture.label is not None, "only val has labels"
        maps = probs(picture)[None].float()
        full = functional.interpolate(maps, picture.label.shape, mode="bilinear")[0]
        confusion += count(full.argmax(0).numpy(), picture.label, confusion)
    return result(confusion)


def count(clusters: np.ndarray, label: UInt8[np.ndarray, "H W"], like: Confusion) -> Confusion:
    """The confusion of one image."""
    return Confusion.count(clusters, label, *like.counts.shape)


def result(confusion: Confusion) -> Result:
    """The scores and sizes of a confusion over all images."""
    scores = confusion.scores()
    sizes = confusion.counts.sum(1) / confusion.counts.sum()
    return Result(
        scores.accuracy,
        scores.miou,
        entropy(sizes),
        tuple(float(size) for size in np.sort(sizes)[::-1]),
        confusion,
    )


def entropy(sizes: np.ndarray) -> float:
    """The entropy of shares over the largest one possible."""
    return float(-xlogy(sizes, sizes).sum() / np.log(len(sizes)))


def truth(pictures: Pictures) -> np.ndarray:
    """The share of the labelled pixels that each class has."""
    counts = sum(np.bincount(p.label.ravel(), minlength=256) for p in pictures.items)  # type: ignore[union-attr]
    counts = counts[: len(pictures.classes)]
    return counts / counts.sum()
