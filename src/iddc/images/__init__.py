"""Find the images a user has, and open each as RGB uint8 or say why it cannot be opened.

Nothing is ever written, and pixels are decoded only by `open_image`: a folder, a zip or a list is
first a tuple of `ImageFile`, each a file to read from and a name to write to.
"""

from iddc.images.check import (
    SURVEYED,
    Skipped,
    Survey,
    check_images,
    expand_pages,
    refuse_many,
    sample,
    survey,
)
from iddc.images.decode import AS_STORED, open_image, open_picture, picture_of, quiet_pillow, to_rgb
from iddc.images.files import FORMATS, MAX_BYTES, MAX_PIXELS, SUFFIXES, ImageFile
from iddc.images.find import FoundImages, find_images, listed
from iddc.images.listing import names_of
from iddc.images.lookahead import ahead
from iddc.images.meaning import Layout, Picture
from iddc.images.measure import (
    Collected,
    collect,
    fit_layouts,
    fit_to_model,
    leaves_open,
    settle,
)
from iddc.images.remote import address_of

__all__ = [
    "AS_STORED",
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "SURVEYED",
    "Collected",
    "FoundImages",
    "ImageFile",
    "Layout",
    "Picture",
    "Skipped",
    "Survey",
    "address_of",
    "ahead",
    "check_images",
    "collect",
    "expand_pages",
    "find_images",
    "fit_layouts",
    "fit_to_model",
    "leaves_open",
    "listed",
    "names_of",
    "open_image",
    "open_picture",
    "picture_of",
    "quiet_pillow",
    "refuse_many",
    "sample",
    "settle",
    "survey",
    "to_rgb",
]
