"""What `iddc predict` does with a video."""

from __future__ import annotations

import time
from itertools import count
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from iddc.cli.learn import say
from iddc.cli.use import claim, parse_shard

if TYPE_CHECKING:
    from iddc.cli.use import Predict
    from iddc.segmenter import Segmenter


def predict_video(command: Predict, segmenter: Segmenter) -> int:
    """Write the masks of its frames as those of images NAME/000000.png, NAME/000001.png, ...

    All frames are decoded, also where masks are there already or another shard makes them: few
    videos can be entered in the middle without decoding what comes before.
    """
    from iddc.images import ImageFile
    from iddc.masks import Collection
    from iddc.progress import INTERVAL, Progress
    from iddc.video import frames

    first, step = parse_shard(command.shard)
    collection = Collection(command.images, command.out, command.formats, segmenter.labels.classes)
    claim(command.out, command.run, command.images, segmenter)
    files: list[ImageFile] = []
    done, kept, progress, shown = 0, 0, Progress(), time.monotonic()
    for index, image in zip(count(), frames(command.images, progress.note), strict=False):
        if index == command.limit:
            break
        name = PurePosixPath(command.images.stem.strip("."), f"{index:06}.png")
        files.append(ImageFile(command.images, name, f"{index:06}.png"))
        if index % step != first - 1:
            continue
        done += 1
        if collection.has(files[-1]):
            kept += 1
            continue
        collection.add(files[-1], segmenter.predict(image, with_probs=collection.needs_probs))
        if time.monotonic() - shown >= INTERVAL:  # ffmpeg does not know how many there are
            shown = time.monotonic()
            progress.note(f"frame {index:,}")
    missing = collection.finish(files)
    there = f", {kept:,} of them there already," if kept else ""
    say(f"masks of {done:,} frames{there} in {command.out}")
    if missing:
        say(f"{missing:,} frames are missing; the shard that ends last puts files of all together.")
    return 0
