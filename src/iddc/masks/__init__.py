"""Names and colours of clusters, and masks in the formats that other programs read."""

from iddc.masks.collection import Collection
from iddc.masks.colours import overlay, palette
from iddc.masks.formats import FORMATS, Segmented
from iddc.masks.ids import write_ids, write_image
from iddc.masks.labels import (
    IGNORED,
    LABELS,
    Classes,
    Labels,
    cluster_names,
    edit_labels,
    read_labels,
    write_labels,
)

__all__ = [
    "FORMATS",
    "IGNORED",
    "LABELS",
    "Classes",
    "Collection",
    "Labels",
    "Segmented",
    "cluster_names",
    "edit_labels",
    "overlay",
    "palette",
    "read_labels",
    "write_ids",
    "write_image",
    "write_labels",
]
