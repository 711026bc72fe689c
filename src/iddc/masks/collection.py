"""The masks of many images in one folder, written by one process or by several at once.

Each image has files of its own, so nothing needs a lock and nothing is lost when a process is
killed: what is there is complete, and what is not is done again. A format that is one file of all
images is put together of such files by whoever finds that no image is missing any more.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path, PurePosixPath

from PIL import Image

from iddc.errors import needs_extra, one_line
from iddc.images import ImageFile, address_of, listed
from iddc.masks.colours import legend
from iddc.masks.cvat import in_list
from iddc.masks.formats import FORMATS, Origin, Segmented
from iddc.masks.ids import encode, write_file
from iddc.masks.labels import Classes
from iddc.runs import Run

CLUSTERS = "parts/clusters"
"""In the folder: the cluster of every pixel, of which all else is made again after a renaming."""
VALID = "parts/valid"
"""In the folder: which pixels hold data, of the images where some hold none."""
SKIPPED = "parts/skipped"
"""In the folder: why an image was left out, one file each; skipped.csv is made of them."""
LEGEND, COLOURED = "legend.svg", {"overlay", "palette"}
"""In the folder: what colours mean, and the formats that show them."""


class Collection:
    """A folder of masks in some formats.

    Args:
        source: The images, as given to `find_images`.
        folder: DIR; made with its parents when it is first written to.
        formats: Names of `FORMATS`.
        classes: What the ids of the masks mean.

    Raises:
        ConfigError: A format cannot hold these classes.
        SetupError: A format needs the extra `formats`.
    """

    def __init__(
        self, source: Path, folder: Path, formats: Sequence[str], classes: Classes
    ) -> None:
        self.source = source
        self.folder = folder
        self.classes = classes
        self.formats = {name: FORMATS[name] for name in formats}
        for name, form in self.formats.items():
            with needs_extra("formats", f"--formats {name} needs {form.package}"):
                import_module(form.package or "iddc")
            if form.check:
                form.check(classes)

    @property
    def needs_probs(self) -> bool:
        """Whether a format holds probabilities."""
        return any(form.with_probs for form in self.formats.values())

    def has(self, file: ImageFile) -> bool:
        """Whether all files of an image are there."""
        return all(
            self.path(key, file, form.suffix).exists()
            for form in self.formats.values()
            for key in form.files
        )

    def is_older(self, file: ImageFile) -> bool:
        """Whether an image may have been written after its clusters, which are then of another.

        Where the clusters are of the future, because the clock was set back, nobody can tell.
        """
        kept = [self.path(CLUSTERS, file, suffix) for suffix in (".png", ".tif")]
        try:
            written, now = file.path.stat().st_mtime_ns, time.time_ns()
            times = [path.stat().st_mtime_ns for path in kept if path.exists()]
            return any(not written <= made <= now for made in times)
        except OSError:  # the image is at an address, or gone
            return False

    def add(self, file: ImageFile, result: Segmented) -> None:
        """Write the files of an image.

        Raises:
            SetupError: One cannot be written.
        """
        # Clusters come first: whatever masks there are after a kill can be made again.
        clusters = encode(Image.fromarray(result.clusters))
        write_file(self.path(CLUSTERS, file, ".png"), clusters)
        if result.valid is not None:
            write_file(self.path(VALID, file, ".png"), encode(Image.fromarray(result.valid)))
        self.write(file, result)
        self.clear_skipped(file)

    def write(self, file: ImageFile, result: Segmented) -> None:
        """Write the files of an image whose clusters are kept already.

        Raises:
            SetupError: One cannot be written.
        """
        origin = self._origin(file)
        for form in self.formats.values():
            for key, encoded in form.files.items():
                write_file(self.path(key, file, form.suffix), encoded(origin, result))

    def mark_skipped(self, file: ImageFile, reason: str) -> None:
        """Note that an image has no masks, and why."""
        text = reason.encode("utf-8", "surrogateescape")
        write_file(self.path(SKIPPED, file, ".txt"), text)

    def clear_skipped(self, file: ImageFile) -> None:
        """Forget that an image was left out."""
        self.path(SKIPPED, file, ".txt").unlink(missing_ok=True)

    def write_skipped(self, files: Sequence[ImageFile]) -> dict[str, str]:
        """Write skipped.csv, and again if another process left an image out meanwhile.

        Args:
            files: The whole collection, in order, whoever wrote its masks.

        Returns:
            The names of the images that it lists, and why each was left out.

        Raises:
            SetupError: It cannot be written.
        """
        written = None
        while (reasons := self._reasons(files)) != written:
            Run(self.folder).write_skipped(reasons.items())
            written = reasons
        return reasons

    def finish(self, files: Sequence[ImageFile]) -> int:
        """Write what is about all images: names, colours, and the formats that are one file.

        Args:
            files: See `write_skipped`.

        Returns:
            How many images are neither there nor left out. While there are any, no such file is
            written. Without such formats nobody looks.

        Raises:
            SetupError: A file cannot be written.
        """
        names = "".join(f"{name}\n" for name in self.classes.names)
        write_file(self.folder / "classes.txt", names.encode())
        if COLOURED & self.formats.keys():
            text = legend(self.classes.names, self.classes.colours)
            write_file(self.folder / LEGEND, text.encode())
        if not any(form.assemble for form in self.formats.values()):
            return 0
        there = [file.name for file in files if self.has(file)]
        missing = {str(file.name) for file in files} - {*map(str, there), *self._reasons(files)}
        for name, form in self.formats.items():
            if form.assemble and not missing:
                parts = self.folder / "parts" / name
                form.assemble(self.folder / form.whole, parts, there, self.classes)
        return len(missing)

    def remarks(self, files: Sequence[ImageFile]) -> list[str]:
        """Sentences on images that programs which read the formats will not find or tell apart."""
        sentences: list[str] = []
        if not {"cvat", "coco", "coco-polygons"} & self.formats.keys():
            return sentences
        names = [PurePosixPath(self._origin(file).name) for file in files]
        changed = {str(name): in_list(name) for name in names}
        changed = {
            n: new for n, new in changed.items() if new != str(PurePosixPath(n).with_suffix(""))
        }
        if "cvat" in self.formats and changed:
            sentences.append(
                f"CVAT's list of images cannot hold {listed(changed)}: the masks are under "
                f"{listed(changed.values())}. Give the images these names before you upload them."
            )
        stems = Counter(name.with_suffix("") for name in names)
        twins = [str(name) for name in names if stems[name.with_suffix("")] > 1]
        if twins:
            sentences.append(
                "CVAT tells images apart by their names without suffix, so it takes the masks of "
                f"these for one another, or finds none: {listed(twins)}. Rename them first."
            )
        return [one_line(sentence) for sentence in sentences]

    def _origin(self, file: ImageFile) -> Origin:
        # A name that was changed to be unique is no path where other programs find the image.
        inside = PurePosixPath(file.inside.replace("\\", "/"))
        name = str(file.name.with_name(inside.name))
        if address_of(file.inside):
            return Origin(name, file.inside, file.inside)
        source, path = (Path(os.path.abspath(path)) for path in (self.source, file.path))
        if file.member:
            return Origin(name, f"{source.stem}/{inside}", inside.name)
        root = source.parent if source.is_dir() else source.parent.parent
        served = path.relative_to(root if path.is_relative_to(root) else "/")
        return Origin(name, str(served), str(path))

    def path(self, key: str, file: ImageFile, suffix: str) -> Path:
        """Where a file of an image is: a/b.jpg has FOLDER/KEY/a/b.SUFFIX."""
        return self.folder / key / file.name.with_suffix(suffix)

    def _reasons(self, files: Sequence[ImageFile]) -> dict[str, str]:
        """Why images were left out, in the order of the images."""
        folder = self.folder / SKIPPED
        notes = {PurePosixPath(note.relative_to(folder)) for note in folder.rglob("*.txt")}
        if not notes:
            return {}
        names = [file.name for file in files if file.name.with_suffix(".txt") in notes]
        return {
            str(name): (folder / name.with_suffix(".txt")).read_text("utf-8", "surrogateescape")
            for name in names
        }
