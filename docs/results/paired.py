"""The difference of two rows seed by seed, from the JSON files beside this one.

    python docs/results/paired.py table6:all table6:kmeans

prints the mean and the standard deviation of the differences of mIoU and of accuracy, in points.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean, stdev


def values(place: str, metric: str) -> list[float]:
    """The scores of a row (`table6:all`), one per seed."""
    table, name = place.split(":")
    rows = json.loads((Path(__file__).parent / f"{table}.json").read_text())["rows"]
    return next(row[metric]["values"] for row in rows if row["name"] == name)


for metric in ("miou", "accuracy"):
    pairs = zip(*(values(place, metric) for place in sys.argv[1:3]), strict=True)
    found = [100 * (first - second) for first, second in pairs]
    print(
        f"{metric} {fmean(found):+.1f} ± {stdev(found):.1f}", [round(value, 1) for value in found]
    )
