"""k-means of grey values, without any network: levels of brightness, as thresholds would cut them.

As `pixels`, with x the grey value of a square alone. On micrographs, whose phases often differ in
grey, it is the method to beat.
"""

from __future__ import annotations

from iddc.methods.pixels import Pixels


class Grey(Pixels):
    """Means of grey values."""

    name = "grey"
    about = "k-means of grey values, without a network."
    backbone = "grey"
