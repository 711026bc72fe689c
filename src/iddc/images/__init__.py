"""Find the images a user has, and open each as RGB uint8 or say why it cannot be opened.

Nothing is ever written, and pixels are decoded only by `open_image`: a folder, a zip or a list is
first a tuple of `ImageFile`, each a file to read from and a name to write to.
"""

from iddc.images.check import Skipped, check_images, refuse_many
from iddc.images.decode import MAX_PIXELS, open_image, quiet_pillow, to_rgb
from iddc.images.files import FORMATS, MAX_BYTES, SUFFIXES, ImageFile
from iddc.images.find import FoundImages, find_images, listed
from iddc.images.lookahead import ahead

__all__ = [
    "FORMATS",
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "FoundImages",
    "ImageFile",
    "Skipped",
    "ahead",
    "check_images",
    "find_images",
    "listed",
    "open_image",
    "quiet_pillow",
    "refuse_many",
    "to_rgb",
]
