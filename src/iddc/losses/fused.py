"""The sums over the pairs of a term in one Triton kernel, for GPUs.

A program visits the pairs of one image and its partner tile by tile: it reads u and v, selects,
weighs, adds up costs and counts, and adds the tile's gradient to both sides, all while the tile is
in registers. Nothing larger than the gradients is stored.

Several programs may share an image, each with rows of its own. The partner's gradient has one part
per program, which are added at the end: no two programs add to the same number, so that the result
does not depend on which comes first.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from iddc.losses.pairs import PairRule, PairSums, Pixels

SIDE = 64
"""Pixels on either side of a tile. A larger one has no room in the registers."""
DEPTH_BYTES = 128
"""Bytes of an embedding read at once: a line of the cache."""
MAX_CLUSTERS = 64
"""Clusters multiplied at once; more are visited in turn."""
PROGRAMS = 256
"""Programs that a large GPU runs at once. Fixed: the number of parts must not depend on the GPU."""


@triton.jit(do_not_specialize=["roll", "blocks"])
@no_type_check  # Triton reads the source, which no type checker may wrap
def _kernel(
    u,
    other_u,
    v,
    other_v,
    centre,
    costs,
    counts,
    gradient,
    other_gradient,
    pixels,
    other_pixels,
    channels,
    clusters,
    u_image,
    u_pixel,
    u_channel,
    other_u_image,
    other_u_pixel,
    other_u_channel,
    roll,
    blocks,
    threshold,
    log_offset,
    positive: tl.constexpr,
    weighting: tl.constexpr,
    penalty: tl.constexpr,
    centred: tl.constexpr,
    needs_grad: tl.constexpr,
    wide: tl.constexpr,
    precision: tl.constexpr,
    side: tl.constexpr,
    depth: tl.constexpr,
    width: tl.constexpr,
):
    # A program compares a part of one image's pixels with all pixels of its partner.
    images = tl.num_programs(0)
    image = tl.program_id(0).to(tl.int64)
    partner = (image + images - roll) % images
    part = tl.program_id(1)
    u += image * u_image
    v += image * pixels * clusters
    gradient += image * pixels * clusters
    other_u += partner * other_u_image
    other_v += partner * other_pixels * clusters
    other_gradient += (part * images + partner) * other_pixels * clusters
    cost_sum = 0.0
    count = 0
    end = tl.minimum((part + 1) * blocks * side, pixels)
    for row in range(part * blocks * side, end, side):
        i = (row + tl.arange(0, side))[:, None]
        for column in range(0, other_pixels, side):
            j = (column + tl.arange(0, side))[None, :]

            # The cosines of a block of pairs, a few channels at a time.
            affinity = tl.zeros((side, side), tl.float32)
            squares = tl.zeros((side,), tl.float32)
            other_squares = tl.zeros((side,), tl.float32)
            for channel in range(0, channels, depth):
                c = channel + tl.arange(0, depth)
                x = tl.load(
                    u + (i * u_pixel + c[None, :] * u_channel),
                    mask=(i < pixels) & (c[None, :] < channels),
                    other=0.0,
                )
                y = tl.load(
                    other_u + (j * other_u_pixel + c[:, None] * other_u_channel),
                    mask=(j < other_pixels) & (c[:, None] < channels),
                    other=0.0,
                )
                if wide:
                    x = x.to(tl.float32)
                    y = y.to(tl.float32)
                if centred:
                    mean = tl.load(centre + c, mask=c < channels, other=0.0)
                    x -= mean[None, :]
                    y -= mean[:, None]
                    squares += tl.sum(x * x, 1)
                    other_squares += tl.sum(y * y, 0)
                affinity = tl.dot(x, y, affinity, input_precision=precision)
            if centred:  # lengths are at least 1e-12, as in torch's normalize
                affinity *= tl.rsqrt(tl.maximum(squares, 1e-24))[:, None]
                affinity *= tl.rsqrt(tl.maximum(other_squares, 1e-24))[None, :]

            # How far two pixels agree on their cluster: the product of their probabilities.
            agreement = tl.zeros((side, side), tl.float32)
            for cluster in tl.range(0, clusters, width, num_stages=1):
                c = cluster + tl.arange(0, width)
                x = tl.load(
                    v + (i * clusters + c[None, :]),
                    mask=(i < pixels) & (c[None, :] < clusters),
                    other=0.0,
                )
                y = tl.load(
                    other_v + (j * clusters + c[:, None]),
                    mask=(j < other_pixels) & (c[:, None] < clusters),
                    other=0.0,
                )
                agreement = tl.dot(x, y, agreement, input_precision=precision)

            # Eqs. (1) to (4): which pairs count, how much, and what each of them costs.
            inside = (i < pixels) & (j < other_pixels)
            if positive:
                selected = inside & (affinity > threshold)
                disagreement = 1 - agreement
            else:
                selected = inside & (affinity < threshold)
                disagreement = agreement
            if weighting == "affinity":
                weights = affinity
            elif weighting == "paper":
                weights = 1 - affinity
            elif weighting == "released":
                weights = tl.where(affinity < 0, 1.0, 1 - affinity)
            else:
                tl.static_assert(weighting == "off")
                weights = tl.full((side, side), 1.0, tl.float32)
            weights *= selected.to(tl.float32)  # unlike a choice, a product lets a NaN be seen
            if penalty == "exp":
                cost = tl.exp(disagreement)
                slope = cost
            elif penalty == "linear":
                cost = disagreement
                slope = tl.full((side, side), 1.0, tl.float32)
            else:
                tl.static_assert(penalty == "log")
                rest = 1 - disagreement
                small = rest < log_offset
                rest = tl.where(small, log_offset, rest)
                cost = -tl.log(rest)
                slope = tl.where(small, 0.0, 1 / rest)
            cost_sum += tl.sum(weights * cost)
            count += tl.sum(selected.to(tl.int32))

            # Each pair pulls at the probabilities of both of its pixels.
            if needs_grad:
                pair_gradient = weights * slope
                if positive:
                    pair_gradient = -pair_gradient
                rows = row + tl.arange(0, side)[:, None]
                columns = column + tl.arange(0, side)[:, None]
                for cluster in tl.range(0, clusters, width, num_stages=1):
                    c = cluster + tl.arange(0, width)[None, :]
                    here = (rows < pixels) & (c < clusters)
                    there = (columns < other_pixels) & (c < clusters)
                    x = tl.load(v + (rows * clusters + c), mask=here, other=0.0)
                    y = tl.load(other_v + (columns * clusters + c), mask=there, other=0.0)
                    tl.atomic_add(
                        gradient + (rows * clusters + c),
                        tl.dot(pair_gradient, y, input_precision=precision),
                        mask=here,
                        sem="relaxed",
                    )
                    tl.atomic_add(
                        other_gradient + (columns * clusters + c),
                        tl.dot(tl.trans(pair_gradient), x, input_precision=precision),
                        mask=there,
                        sem="relaxed",
                    )
    tl.store(costs + part * images + image, cost_sum)
    tl.store(counts + part * images + image, count)


def sum_fused(
    first: Pixels,
    other: Pixels,
    rule: PairRule,
    *,
    roll: int = 0,
    centre: Float[Tensor, " d"] | None = None,
    needs_grad: bool = True,
) -> PairSums:
    """As `sum_in_blocks`, on tensors of a CUDA device, with sums in fp32.

    Embeddings in fp32, or less their centre, are multiplied in fp32. Those in bf16 or fp16 are
    multiplied as they are, and the products are added in fp32.
    """
    u, other_u = first.embeddings, other.embeddings
    v, other_v = first.probs.float().contiguous(), other.probs.float().contiguous()
    # Several programs share an image where there are few of them.
    images, pixels, clusters = v.shape
    other_pixels, channels = other_u.shape[1:]
    interpreted = not isinstance(_kernel, triton.JITFunction)
    wide = interpreted or centre is not None or torch.float32 in (u.dtype, other_u.dtype)
    rows = triton.cdiv(pixels, SIDE)
    blocks = triton.cdiv(rows, min(rows, max(1, PROGRAMS // images)))
    parts = triton.cdiv(rows, blocks)
    # Memory of its own for the sums of each program: their order does not matter.
    costs = v.new_empty(parts, images)
    counts = v.new_empty(parts, images, dtype=torch.int32)
    gradient = torch.zeros_like(v) if needs_grad else v
    other_gradient = v.new_zeros(parts, *other_v.shape) if needs_grad else v
    with torch.cuda.device(v.get_device()):
        _kernel[images, parts](
            u,
            other_u,
            v,
            other_v,
            v if centre is None else centre.contiguous(),
            costs,
            counts,
            gradient,
            other_gradient,
            pixels,
            other_pixels,
            channels,
            clusters,
            *u.stride(),
            *other_u.stride(),
            roll % images,
            blocks,
            rule.threshold,
            rule.log_offset,
            positive=rule.positive,
            weighting=rule.weights,
            penalty=rule.penalty,
            centred=centre is not None,
            needs_grad=needs_grad,
            wide=wide,
            precision=_precision(v.device),
            side=SIDE,
            depth=DEPTH_BYTES // (4 if wide else u.itemsize),
            width=min(MAX_CLUSTERS, max(16, triton.next_power_of_2(clusters))),
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=True,
        )
    gradients = (gradient, other_gradient.sum(0)) if needs_grad else None
    return PairSums(costs.sum(), counts.sum(), gradients)


def _precision(device: torch.device) -> str:
    """How fp32 is multiplied: on tensor cores in three parts, or as it is. Both are exact to fp32.

    One TF32 product alone would keep 11 bits.
    """
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (8,)
    ):
        return "ieee"
    return "tf32x3"


def try_out() -> None:
    """Compile and run the kernel once: raises where Triton, its compiler or the GPU fail."""
    embeddings = torch.ones(1, SIDE, 32, device="cuda")
    pixels = Pixels(embeddings, embeddings)
    rule = PairRule(
        positive=True, threshold=0.0, weights="affinity", penalty="exp", log_offset=1e-6
    )
    sum_fused(pixels, pixels, rule, centre=embeddings[0, 0])
    torch.cuda.synchronize()
