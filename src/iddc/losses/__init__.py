"""The objective of IDDC: Eqs. (1)-(8) of the paper.

Two crops of every image give pixels with embeddings u and cluster probabilities v. The positive
term pulls the probabilities of look-alike pixels of one image together, the negative term pushes
those of unlike pixels of different images apart, the regulariser keeps every cluster alive.

What is unusual here: a term is a mean over pairs of pixels, of which a batch at stride 8 has 40
million. Their sum and its gradient are taken in one pass, on a GPU in one kernel (`fused.py`),
elsewhere in blocks that stay in the cache (`pairs.py`). Nothing of the size of all pairs is stored,
and the gradient is exact. Affinities are targets and carry no gradient.
"""

from iddc.losses.objective import Objective, Terms
from iddc.losses.pairs import Pixels
from iddc.losses.penalties import PENALTIES
from iddc.losses.regularizers import REGULARIZERS, cluster_frequencies
from iddc.losses.terms import fused_obstacle, negative_loss, positive_loss

__all__ = [
    "PENALTIES",
    "REGULARIZERS",
    "Objective",
    "Pixels",
    "Terms",
    "cluster_frequencies",
    "fused_obstacle",
    "negative_loss",
    "positive_loss",
]
