"""Areas on the ground: in square metres on the WGS 84 ellipsoid, whatever the projection.

Longitude and latitude are mapped to a plane that keeps areas (the cylindrical equal-area projection
of the ellipsoid, Snyder 1987, Eqs. 3-12 and 10-9), where the area of a polygon is its shoelace sum.
Many projections do not keep areas: a square metre of Web Mercator at 50 degrees is 0.41 on the
ground.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

EQUATOR, FLATTENING = 6378137.0, 1 / 298.257223563
"""The radius of the WGS 84 ellipsoid at the equator, in metres, and its flattening."""
_SQUARED = FLATTENING * (2 - FLATTENING)
"""The square of its eccentricity."""


def equal_area(
    longitude: Float[np.ndarray, "*n"], latitude: Float[np.ndarray, "*n"]
) -> Float[np.ndarray, "*n 2"]:
    """Map degrees to metres in a plane that keeps areas."""
    sine, e = np.sin(np.radians(latitude)), np.sqrt(_SQUARED)
    q = (1 - _SQUARED) * (sine / (1 - _SQUARED * sine**2) + np.arctanh(e * sine) / e)
    return np.stack([EQUATOR * np.radians(longitude), EQUATOR * q / 2], axis=-1)


def ring_area(ring: Float[np.ndarray, "n 2"]) -> float:
    """The area of a polygon of longitudes and latitudes, in square metres.

    Edges are straight between corners as they are in the plane, so corners of long edges should be
    close together. The polygon must not cross the date line.
    """
    x, y = equal_area(ring[:, 0], ring[:, 1]).T
    x, y = x - x.mean(), y - y.mean()  # small numbers keep their digits
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
