"""The pictures of a report: samples with their masks, clusters with their regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from iddc.masks import IGNORED
from iddc.metrics import UNMATCHED
from iddc.report.look import RunStatistics, largest_part
from iddc.report.pictures import TILES, mask, mosaic, photo
from iddc.report.sides import Match, ReportedRun
from iddc.report.tables import NEAREST, nearest, percent

CARDS = 100
"""How many clusters have pictures: the largest. They keep a report of one run below 20 MB."""


TAGGED = 0.02
"""The share of an image from which on a region has its name written on it."""


@dataclass(frozen=True)
class Tag:
    """A name, and where it stands on an image, in percent from its left and its top."""

    name: str
    left: float
    top: float


@dataclass(frozen=True)
class Figure:
    """A sample image, and its mask by each run with a sentence that says what it shows."""

    name: str
    size: tuple[int, int]
    photo: str
    masks: Sequence[tuple[str, str, Sequence[Tag]]]


@dataclass(frozen=True)
class Card:
    """A cluster: what its regions look like, how large it is, how sure, and what it is near."""

    cluster: int
    name: str
    colour: str
    share: float
    images: int
    sure: float
    nearest: Sequence[tuple[str, float]]
    regions: str
    """A mosaic; empty if the cluster does not occur."""


def figures(sides: Sequence[ReportedRun]) -> list[Figure]:
    """The samples. All runs have looked at the same images."""
    looks = [(side, side.look) for side in sides if side.look]
    found = []
    for place, seen in enumerate(looks[0][1].seen if looks else ()):
        masks = []
        for side, look in looks:
            clusters = look.seen[place].mask
            if clusters is None:
                continue
            ignored = np.array([name == IGNORED for name in side.labels.names])
            held = clusters[clusters != UNMATCHED]
            shares = np.bincount(held, minlength=len(ignored)) / max(1, held.size)
            largest = np.argsort(-shares, kind="stable")[:NEAREST].tolist()
            parts = ", ".join(f"{side.title(c)} {percent(shares[c])}" for c in largest if shares[c])
            text = f"Mask of {seen.name} by {side.name}: {parts}"
            tags = _tags(side, clusters, np.flatnonzero(~ignored & (shares >= TAGGED)).tolist())
            masks.append((mask(clusters, side.colours, ignored), text, tags))
        if masks:
            found.append(Figure(seen.name, seen.image.size, photo(seen.image), masks))
    return found


def _tags(
    side: ReportedRun, clusters: Integer[np.ndarray, "H W"], named: Sequence[int]
) -> list[Tag]:
    """The names of the large clusters of a mask, each in the middle of its largest region."""
    from scipy import ndimage

    height, width = clusters.shape
    tags = []
    for cluster in named:
        # The frame makes the border of the image a border of the region too.
        inside = np.pad(largest_part(clusters == cluster), 1)
        depth: np.ndarray = ndimage.distance_transform_cdt(inside)  # type: ignore[attr-defined]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        left, top = 100 * (int(column) - 0.5) / width, 100 * (int(row) - 0.5) / height
        name = side.labels.names[cluster]
        short = str(cluster) if name == f"cluster {cluster}" else name
        tags.append(Tag(short, round(left, 1), round(top, 1)))
    return tags


def cards(sides: Sequence[ReportedRun], matched: Match | None) -> list[list[Card | None]]:
    """The largest clusters of the runs, a column for each, matched ones side by side."""
    columns = [
        {
            cluster: _card(side, side.look, cluster)
            for cluster in np.argsort(-side.look.counts, kind="stable")[:CARDS].tolist()
        }
        for side in sides
        if side.look
    ]
    if not matched:
        return [[card] for column in columns[:1] for card in column.values()]
    first, second = columns
    partner = {int(p): c for c, p in enumerate(matched.partner) if p != UNMATCHED}
    rows: list[list[Card | None]] = [
        [card, second.pop(partner.get(cluster, UNMATCHED), None)] for cluster, card in first.items()
    ]
    return rows + [[None, card] for card in second.values()]


def _card(side: ReportedRun, look: RunStatistics, cluster: int) -> Card:
    own = [place for place, region in enumerate(look.regions) if region.cluster == cluster]
    sure = sorted(own, key=lambda place: -look.regions[place].confidence)[: TILES // 2]
    typical = sorted(own, key=lambda place: -look.typical[place])
    shown = [*sure, *(place for place in typical if place not in sure)][:TILES]
    return Card(
        cluster=cluster,
        name=side.title(cluster),
        colour=side.colour(cluster),
        share=float(look.shares[cluster]),
        images=int(look.images[cluster]),
        sure=float(look.mean_probs[cluster, cluster]),
        nearest=[(side.title(other), share) for other, share in nearest(look, cluster)],
        regions=mosaic(look, [look.regions[place] for place in shown]),
    )


def legend(side: ReportedRun) -> list[tuple[str, str]]:
    """Name and colour of each cluster that is not ignored, the largest first."""
    counts = side.look.counts if side.look else np.zeros(len(side.colours))
    order = np.argsort(-counts, kind="stable").tolist()
    return [(side.title(c), side.colour(c)) for c in order if side.labels.names[c] != IGNORED]
