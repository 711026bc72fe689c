"""Whether a run is worth keeping, in plain words: what its own numbers say. No label is read.

The score is how well clusters follow the images: colours divide an image into regions, and the
patches of one region should have one cluster. It is the share of patches that have the cluster of
most patches of their region, less what one cluster for everything would have. Of the numbers that
need no label it goes best with mIoU where there are labels (docs/verdict.md). It cannot know what a
person wants to tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Integer

from iddc.config import Experiment
from iddc.errors import counted
from iddc.learning.guards import LIVE_SHARE
from iddc.regions import colour_regions, follows_regions, patch_colours
from iddc.report.look import RunStatistics

GOOD, FAIR = 0.6, 0.4
"""The least score of a good and of a fair run. A lower one is poor."""
CONFUSED = 0.5
"""Two clusters are hard to tell apart if each has this part of the other's probability."""
POSITION = 0.6
"""The share of a cluster that its position in the image explains, from which on it is named."""
UNSURE = 0.5
"""A mean confidence below it is called low."""
LARGE = 0.6
"""The share of the patches from which on a cluster is called too large."""
FEW = 50
"""Fewer images than these are called few."""
_GRID = 12
"""The side of the grid on which positions of different images are compared."""
_LEAST = 8
"""The fewest images that can tell position from content."""
_PAIRS = 3
"""How many pairs or clusters a sentence names."""


@dataclass(frozen=True)
class Finding:
    """A number, and what to do about it."""

    text: str
    """The number in a sentence."""
    advice: str = ""
    """What to try; nothing where all is well."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers of a run say of it."""

    grade: Literal["good", "fair", "poor"]
    score: float
    """How well the clusters follow the images, at most 1."""
    findings: tuple[Finding, ...]

    @property
    def headline(self) -> str:
        """The verdict in one sentence, with its number."""
        return (
            f"Verdict: {self.grade}. How well the clusters follow the colours of the images: "
            f"{100 * max(0.0, self.score):.0f} % (good from {100 * GOOD:.0f} %, poor below "
            f"{100 * FAIR:.0f} %)."
        )

    def lines(self) -> Iterator[str]:
        """The verdict as text, a finding in each line."""
        yield self.headline
        for finding in self.findings:
            yield f"  - {finding.text}" + (f" Try: {finding.advice}" if finding.advice else "")


def judge(
    look: RunStatistics,
    experiment: Experiment,
    names: Sequence[str],
    *,
    images: int,
    agreement: float | None = None,
) -> Verdict:
    """Judge a run by what it does on some of its images.

    Args:
        look: What it does there.
        experiment: What was trained.
        names: What the clusters are called.
        images: How many images it was trained on.
        agreement: The share of patches on which its heads or groupings agree, if that is known.
    """
    score = follows_colours(look)
    grade: Literal["good", "fair", "poor"] = (
        "good" if score >= GOOD else "fair" if score >= FAIR else "poor"
    )
    findings = [
        *_grey(look, experiment),
        *_sizes(look, names),
        *_pairs(look, names),
        *_positions(look, names),
        *_confidence(look),
        *_agreement(agreement),
        *_causes(experiment, grade, images),
    ]
    return Verdict(grade, score, tuple(findings))


def follows_colours(look: RunStatistics) -> float:
    """How well clusters follow the regions of like colour, see the module; at most 1."""
    regions = []
    for seen in look.seen:
        height, width = seen.clusters.shape
        pixels = torch.from_numpy(np.array(seen.image)).permute(2, 0, 1)
        regions.append(colour_regions(patch_colours(pixels, (height, width))).numpy())
    return follows_regions([seen.clusters for seen in look.seen], regions, len(look.counts))


def position_shares(
    clusters: Sequence[Integer[np.ndarray, "_ _"]], k: int
) -> Float[np.ndarray, " k"]:
    """The part of each cluster that its position in the image explains, in [0, 1].

    It is the variance between positions of whether a patch has the cluster, over the whole
    variance, without the part that chance gives to few images. 1: the cluster is at the same place
    in every image, whatever is there.
    """
    rows = []
    for ids in clusters:
        height, width = ids.shape
        down = ((np.arange(_GRID) + 0.5) * height / _GRID).astype(int)
        across = ((np.arange(_GRID) + 0.5) * width / _GRID).astype(int)
        rows.append(ids[down[:, None], across].ravel())
    grid = np.stack(rows)  # images x positions
    count = len(grid)
    shares: np.ndarray = np.zeros(k)
    for cluster in np.unique(grid):
        mean = (grid == cluster).mean(0)
        within = (mean * (1 - mean)).mean() * count / max(1, count - 1)
        whole = mean.mean() * (1 - mean.mean())
        shares[cluster] = max(0.0, 1 - within / whole) if whole > 0 else 0.0
    return shares


def confused_pairs(look: RunStatistics) -> list[tuple[int, int, float]]:
    """Pairs of clusters that are hard to tell apart, the hardest first.

    Each has at least `CONFUSED` of the other's probability where the other wins; the number is the
    smaller one of the two ratios.
    """
    live = [int(c) for c in np.flatnonzero(look.counts)]
    near: dict[tuple[int, int], float] = {}
    for c in live:
        row = look.mean_probs[[c]].tocoo()
        own = float(look.mean_probs[c, c])
        for other, share in zip(row.col.tolist(), row.data.tolist(), strict=True):
            if other != c and share >= CONFUSED * own:
                near[c, int(other)] = share / own
    pairs = [
        (one, other, min(near[one, other], near[other, one]))
        for one, other in combinations(live, 2)
        if (one, other) in near and (other, one) in near
    ]
    return sorted(pairs, key=lambda pair: -pair[2])


def _grey(look: RunStatistics, experiment: Experiment) -> Iterator[Finding]:
    """On labelled micrographs the score hardly goes with the mIoU (docs/verdict.md)."""
    pixels = (np.asarray(seen.image) for seen in look.seen)
    if all((each == each[..., :1]).all() for each in pixels):
        yield Finding(
            "The images are grey. On grey micrographs with labels, this verdict said little about "
            "the result.",
            "trust your eyes."
            if experiment.method == "grey"
            else "trust your eyes, and compare with grey values: "
            "`iddc baseline grey IMAGES --out RUN2`.",
        )


def _sizes(look: RunStatistics, names: Sequence[str]) -> Iterator[Finding]:
    k = len(look.counts)
    live = int((look.shares * k >= LIVE_SHARE).sum())
    few = 4 * live < 3 * k
    advice = f"-k {max(2, live)}, or leave it: rare clusters do no harm." if few else ""
    yield Finding(
        f"{live} of {k} clusters are in use: each has at least a tenth of an even share.", advice
    )
    largest = int(look.counts.argmax())
    if look.shares[largest] >= LARGE:
        more = f"-k {2 * k}; `iddc sweep IMAGES --out DIR` shows several at once."
        less = "look at the masks. One kind may cover most of your images, as in micrographs."
        yield Finding(
            f"The largest cluster, {_called(names, largest)}, covers "
            f"{_percent(look.shares[largest])} of the patches.",
            more if live == k else less,
        )


def _pairs(look: RunStatistics, names: Sequence[str]) -> Iterator[Finding]:
    if not (pairs := confused_pairs(look)):
        return
    told = [
        f"{_called(names, one)} and {_called(names, other)} ({_percent(ratio)})"
        for one, other, ratio in pairs[:_PAIRS]
    ]
    more = f" and {counted(len(pairs) - _PAIRS, 'other pair')}" if len(pairs) > _PAIRS else ""
    one, other, _ = pairs[0]
    yield Finding(
        f"Hard to tell apart: {', '.join(told)}{more}. The percentage says how close the second "
        "cluster's probability comes to the winner's.",
        "look at both in the report, and merge them: "
        f"`iddc label RUN --set {one}=NAME {other}=NAME`",
    )


def _positions(look: RunStatistics, names: Sequence[str]) -> Iterator[Finding]:
    if len(look.seen) < _LEAST:
        return
    shares = position_shares([seen.clusters for seen in look.seen], len(look.counts))
    found = [int(c) for c in np.argsort(-shares, kind="stable") if shares[c] >= POSITION]
    if not found:
        return
    told = [f"{_called(names, c)} ({_percent(shares[c])})" for c in found[:_PAIRS]]
    more = f" and {counted(len(found) - _PAIRS, 'other')}" if len(found) > _PAIRS else ""
    yield Finding(
        f"Mostly at the same place in every image: {', '.join(told)}{more}. The percentage says "
        "how much of a cluster's mask follows from the position in the image alone.",
        "nothing if the images are like that (sky above, road below); otherwise another backbone "
        "or `iddc pretrain`.",
    )


def _confidence(look: RunStatistics) -> Iterator[Finding]:
    sure = float((look.mean_probs.diagonal() * look.shares).sum())
    advice = "a smaller -k, more images or a stronger backbone." if sure < UNSURE else ""
    yield Finding(f"The mean confidence is {_percent(sure)}.", advice)


def _agreement(agreement: float | None) -> Iterator[Finding]:
    if agreement is None:
        return
    advice = (
        "`iddc sweep IMAGES --out DIR`, which shows at which K they agree."
        if agreement < 0.6
        else ""
    )
    yield Finding(f"Repeated clusterings agree on {_percent(agreement)} of the patches.", advice)


def _causes(experiment: Experiment, grade: str, images: int) -> Iterator[Finding]:
    if images < FEW:
        yield Finding(
            f"The training saw only {counted(images, 'image')}.",
            f"{FEW} images or more, of different scenes.",
        )
    if grade != "good" and experiment.backbone == "bundled":
        yield Finding(
            "The backbone is the small one that comes with the package.",
            "`--backbone dino-vits16`, or train one on your own images: "
            "`iddc pretrain IMAGES --out DIR`",
        )


def _called(names: Sequence[str], cluster: int) -> str:
    name, number = names[cluster], f"cluster {cluster}"
    return number if name == number else f"{name} ({cluster})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
