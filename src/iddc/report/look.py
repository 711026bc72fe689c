"""What a run does on some images, without labels: shares, doubts, regions, affinities.

Each image is seen whole, reduced to at most 640 pixels and not mirrored, on the grid of patches.
That is one forward pass; masks as `iddc predict` makes them are drawn for the samples only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Integer
from PIL import Image
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import normalize

from iddc.device import autocast
from iddc.errors import UnreadableImage
from iddc.gaps import data_patches, resized_mask
from iddc.images import ImageFile, open_picture
from iddc.metrics import UNMATCHED
from iddc.network import Network
from iddc.progress import SILENT, Progress
from iddc.segmenter import Segmenter
from iddc.thresholds import Affinities
from iddc.windows import to_working_size

IMAGES, PATCHES = 64, 64
"""How many images are looked at, and of how many patches of each the affinities are compared."""
SIDE = 640
"""The longer side of an image as it is looked at and shown, in pixels."""
_MOST = 64
"""How many probabilities of a patch count as confusion: of 65,535 clusters, all would be 17 GB."""


@dataclass(frozen=True)
class ViewedImage:
    """One image."""

    name: str
    image: Image.Image
    """The image as it was looked at: the longer side has at most SIDE pixels."""
    clusters: Integer[np.ndarray, "h w"]
    """The cluster of each patch; UNMATCHED where there is no data."""
    mask: Integer[np.ndarray, "H W"] | None
    """The cluster of each pixel, as `iddc predict` finds them, UNMATCHED where there is no data;
    samples alone have it."""


@dataclass(frozen=True)
class Region:
    """The largest connected part of a cluster in an image."""

    cluster: int
    image: int
    """The position of its image in `RunStatistics.seen`."""
    confidence: float
    """The mean probability of the cluster."""
    embedding: Float[Tensor, " d"]
    """The mean of those of its patches, each of length 1."""


@dataclass(frozen=True)
class RunStatistics:
    """What a run does on some images."""

    seen: tuple[ViewedImage, ...]
    counts: Integer[np.ndarray, " k"]
    """In how many patches each cluster is the most probable one."""
    images: Integer[np.ndarray, " k"]
    """In how many images it is so somewhere."""
    frequencies: Float[np.ndarray, " k"]
    """p_c, the mean probability of each cluster."""
    mean_probs: csr_array
    """Where the cluster of the row wins, the mean probability of each, (k, k). A patch adds its 64
    highest probabilities, and a row is empty if its cluster never wins."""
    regions: tuple[Region, ...]
    typical: Float[np.ndarray, " r"]
    """The cosine of the embeddings of each region and of all patches of its cluster."""
    affinities: Affinities
    """Affinities of pairs of patches of one and of two clusters of this run."""

    def patches(self, region: Region) -> Bool[np.ndarray, "h w"]:
        """Where a region is. Found again, since of thousands of clusters all would fill memory."""
        return largest_part(self.seen[region.image].clusters == region.cluster)

    @property
    def shares(self) -> Float[np.ndarray, " k"]:
        """The fraction of all patches that each cluster has."""
        shares: np.ndarray = self.counts / self.counts.sum()
        return shares


def look_at(
    segmenter: Segmenter,
    files: Sequence[ImageFile],
    *,
    samples: int,
    progress: Progress = SILENT,
) -> RunStatistics | None:
    """Look at up to IMAGES of the images, evenly spread; None if none can be read.

    Args:
        segmenter: A loaded run.
        files: The images.
        samples: How many of them get a mask, evenly spread too.
        progress: Shows how far the work is.
    """
    network = segmenter.network
    assert isinstance(network, Network)  # what `Segmenter.load` gives
    chosen = _spread(len(files), IMAGES)
    shown = {chosen[place] for place in _spread(len(chosen), samples)}
    k, rng = segmenter.num_clusters, np.random.default_rng(0)
    counts, images = np.zeros(k, np.int64), np.zeros(k, np.int64)
    mass, total = torch.zeros(k).double(), torch.zeros(k, network.backbone.embed_dim)
    summed = csr_array((k, k), dtype=np.float32)
    seen: list[ViewedImage] = []
    regions: list[Region] = []
    drawn: list[tuple[Tensor, Tensor]] = []
    with progress.job(len(chosen)):
        for done, index in enumerate(chosen, start=1):
            try:
                picture = open_picture(files[index], reading=segmenter.experiment.reading)
            except UnreadableImage:
                continue
            if picture.valid is not None and not picture.valid.any():
                continue
            small = picture.image.copy()
            small.thumbnail((SIDE, SIDE))
            probs, vectors = _embedded(segmenter, network, small)
            # Sums over patches: how sure clusters are, and with which others they are confused.
            confidence, ids = (values.cpu() for values in probs.max(0))
            holds = torch.ones_like(ids, dtype=torch.bool)
            if picture.valid is not None:
                mask_of_all = torch.from_numpy(resized_mask(picture.valid, small.size).copy())
                holds = data_patches(mask_of_all, (ids.shape[0], ids.shape[1]))
            inside_all = holds.flatten()
            flat, own = vectors.flatten(1).T[inside_all], ids.flatten()[inside_all]
            likely = probs.flatten(1)[:, inside_all.to(probs.device)]
            mass += likely.double().sum(1).cpu()
            summed += _summed_probs(likely, own)
            total.index_add_(0, own, flat)
            found = np.bincount(own, minlength=k)
            counts += found
            ids = torch.where(holds, ids, UNMATCHED)
            images += found > 0
            # The largest region of each cluster in this image.
            for cluster in np.flatnonzero(found).tolist():
                part = largest_part(ids.numpy() == cluster)
                inside = torch.from_numpy(part)
                mean = vectors[:, inside].mean(1)
                sure = float(confidence[inside].mean())
                regions.append(Region(cluster, len(seen), sure, mean))
            # The mask, of the few images that are shown, and patches for the affinities.
            mask = None
            if index in shown:
                result = segmenter.predict(picture)
                clusters = result.clusters.astype(np.int32)
                if result.valid is not None:
                    clusters = np.where(result.valid, clusters, np.int32(UNMATCHED))
                resized = Image.fromarray(clusters).resize(small.size, Image.Resampling.NEAREST)
                mask = np.asarray(resized)
            seen.append(ViewedImage(str(files[index].name), small, ids.numpy(), mask))
            places = torch.from_numpy(rng.permutation(len(own))[:PATCHES])
            drawn.append((flat[places], own[places]))
            progress.update(done, "looking", f"image {done} of {len(chosen)}")
    if not seen:
        return None
    means = normalize(total, dim=1)
    return RunStatistics(
        seen=tuple(seen),
        counts=counts,
        images=images,
        frequencies=mass.numpy() / counts.sum(),
        mean_probs=summed.multiply(1 / np.maximum(counts, 1)[:, None]).tocsr(),
        regions=tuple(regions),
        typical=np.array(
            [float(normalize(r.embedding, dim=0) @ means[r.cluster]) for r in regions]
        ),
        affinities=_affinities(drawn, centred=segmenter.experiment.objective.centering == "batch"),
    )


def _spread(number: int, wanted: int) -> list[int]:
    """Up to `wanted` places of `number`, evenly spread, in order."""
    taken = min(number, wanted)
    return [place * number // taken for place in range(taken)]


def _embedded(
    segmenter: Segmenter, network: Network, image: Image.Image
) -> tuple[Float[Tensor, "k h w"], Float[Tensor, "d h w"]]:
    """The probabilities of the patches of an image, and their embeddings of length 1."""
    device = segmenter.device
    pixels = to_working_size(image, segmenter.experiment.views.short_side, 0)[None].to(device)
    with torch.no_grad(), autocast(device, segmenter.experiment.training.precision):
        features = network.embed(pixels)
        logits = network.logits_from(features)
    return logits[0].float().softmax(0), normalize(features[0].float(), dim=0).cpu()


def _summed_probs(probs: Float[Tensor, "k n"], ids: Int64[Tensor, " n"]) -> csr_array:
    """The sums of the highest probabilities, (k, k); rows are the clusters that win patches."""
    k = len(probs)
    highest, others = (values.cpu() for values in probs.topk(min(_MOST, k), dim=0))
    winners = ids.expand_as(others)
    places = winners.flatten().numpy(), others.flatten().numpy()
    return csr_array((highest.flatten().numpy(), places), shape=(k, k))


def largest_part(where: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The largest connected part; parts that touch at a corner only are two."""
    from scipy import ndimage

    parts, _ = ndimage.label(where)  # type: ignore[attr-defined]  # no stubs
    part: np.ndarray = parts == np.bincount(parts[where]).argmax()
    return part


def _affinities(drawn: Sequence[tuple[Tensor, Tensor]], *, centred: bool) -> Affinities:
    vectors, ids = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    if centred:
        vectors = normalize(vectors - vectors.mean(0), dim=1)
    return Affinities.of(vectors, ids)
