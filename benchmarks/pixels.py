"""Scores that need no network, on any labelled folder: what a result has to be above.

    python benchmarks/pixels.py camvid/train/images --data camvid --seeds 3

- One cluster for everything.
- One picture for all images: the class that each position has most often in the labels of the train
  split. It needs labels, so it is no rival of an unsupervised method, but it says how much of a
  score the position alone can give.
- k-means on red, green, blue, row and distance from the central column, each from 0 to 1. It sees
  no label; there are as many clusters as classes.

Pixels are scored at the label's size, by one Hungarian matching, as in protocol `full`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from iddc.datasets import LabelledImages, open_dataset
from iddc.errors import DataError
from iddc.images import ImageFile, find_images, open_image
from iddc.metrics import Confusion, Scores

PIXELS = 300
"""How many pixels of each image k-means sees."""

Clusters = Callable[[UInt8[np.ndarray, "H W 3"]], Integer[np.ndarray, "H W"]]


def features(image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "n 5"]:
    """Red, green, blue, row and distance from the central column of every pixel, in [0, 1]."""
    height, width = image.shape[:2]
    rows, columns = (np.indices((height, width)) + 0.5) / [[[height]], [[width]]]
    place = np.stack([rows, abs(2 * columns - 1)], axis=-1)
    return np.concatenate([image / 255, place], axis=-1).reshape(-1, 5)


def one_cluster(image: UInt8[np.ndarray, "H W 3"]) -> Integer[np.ndarray, "H W"]:
    """Cluster 0 everywhere."""
    return np.zeros(image.shape[:2], np.int64)


def constant_picture(labels: Iterable[UInt8[np.ndarray, "H W"]], num_classes: int) -> Clusters:
    """The most frequent class of each position of labels, in the size of the first of them."""
    votes: np.ndarray | None = None
    for label in labels:
        if votes is None:
            votes = np.zeros((num_classes, *label.shape), np.int64)
        small = resized(label, votes.shape[1:])
        for number in range(num_classes):
            votes[number] += small == number
    if votes is None:
        raise DataError("Expected at least one label, found none.")
    picture = votes.argmax(0).astype(np.uint8)
    return lambda image: resized(picture, image.shape[:2])


def kmeans(files: Sequence[ImageFile], num_clusters: int, seed: int) -> Clusters:
    """k-means on colour and position; the best of three restarts."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    rows = []
    for file in files:
        every = features(np.asarray(open_image(file)))
        rows.append(every[rng.integers(len(every), size=PIXELS)])
    found = KMeans(num_clusters, n_init=3, random_state=seed).fit(np.concatenate(rows))
    centres = found.cluster_centers_

    def clusters(image: np.ndarray) -> np.ndarray:
        # |x - c|^2 less |x|^2, which is the same for all centres.
        distances = (centres**2).sum(1) - 2 * features(image) @ centres.T
        nearest: np.ndarray = distances.argmin(1).reshape(image.shape[:2])
        return nearest

    return clusters


def resized(label: UInt8[np.ndarray, "H W"], size: tuple[int, ...]) -> UInt8[np.ndarray, "h w"]:
    """A picture of ids in another size, by the nearest pixel."""
    if label.shape == tuple(size):
        return label
    small: np.ndarray = np.asarray(
        Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST)
    )
    return small


def scores(dataset: LabelledImages, clusters: Clusters, num_clusters: int) -> Scores:
    """Accuracy and mIoU of clusters on labelled images, by one matching."""
    confusion = Confusion.zeros(num_clusters, dataset.num_classes)
    for index in range(len(dataset)):
        sample = dataset[index]
        image = sample.image.resize(sample.label.shape[::-1], Image.Resampling.BILINEAR)
        found = clusters(np.asarray(image))
        confusion += Confusion.count(found, sample.label, num_clusters, dataset.num_classes)
    return confusion.scores(confusion.match("classes"))


def main() -> None:
    """Print a row for each baseline."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", type=Path, help="what k-means learns from")
    parser.add_argument("--data", type=Path, required=True, help="holds the labelled splits")
    parser.add_argument("--split", default="val", help="what is scored")
    parser.add_argument(
        "--num-clusters", type=int, help="of k-means; as many as classes if not given"
    )
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    dataset = open_dataset("folder", args.data, args.split)
    classes = dataset.num_classes
    number = args.num_clusters or classes
    print(f"`python {' '.join(sys.argv)}`\n\n| accuracy / mIoU (%) | seeds from 0 on |\n|---|---|")
    print(f"| one cluster | {shown(scores(dataset, one_cluster, classes))} |", flush=True)
    try:
        train = open_dataset("folder", args.data, "train")
        labels = (train[index].label for index in range(len(train)))
        cell = shown(scores(dataset, constant_picture(labels, classes), classes))
    except DataError as error:
        cell = f"not run: {error}"
    print(f"| one picture for all, from the labels of train | {cell} |", flush=True)
    files = find_images(args.images).files
    cells = [shown(scores(dataset, kmeans(files, number, s), number)) for s in range(args.seeds)]
    print(f"| k-means, K = {number}, on colour, row, distance from the central column | "
          f"{', '.join(cells)} |")  # fmt: skip


def shown(found: Scores) -> str:
    """Accuracy and mIoU in percent."""
    return f"{100 * found.accuracy:.1f} / {100 * (found.miou or 0):.1f}"


if __name__ == "__main__":
    main()
