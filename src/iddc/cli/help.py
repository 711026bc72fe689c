"""Short help: what one needs first, on one screen. tyro's own help lists everything (-hh).

A command has the options that most people need, each in one line, and two examples. Nothing is
imported that takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 100
"""The most characters of a line."""
GROUPS = {
    "Start here": ("demo", "check", "sweep", "train", "report", "label", "predict"),
    "Use a model": ("relabel", "evaluate", "export"),
    "Compare and reproduce": (
        *("compare", "baseline", "pretrain", "analyze", "reproduce", "recipes", "models", "import"),
    ),
    "This machine": ("doctor", "verify", "bench"),
}
"""The order of commands in `iddc --help`. Those that no group names come last."""
SHORT, ALL = frozenset({"-h", "--help"}), frozenset({"-hh", "--help-all"})


@dataclass(frozen=True)
class Short:
    """The help of a command on one screen."""

    usage: str
    """What stands after the name of the command."""
    options: Mapping[str, str]
    """The options that most people need, and what they do."""
    examples: Sequence[str]
    """Two command lines, without `iddc` and the name."""


_DEVICE = {"--device D": "cpu, cuda, cuda:1 or mps (default: a GPU if there is one)"}
_JSON = {"--json": "print one JSON object instead of a table"}
TEXTS = {
    "train": Short(
        "IMAGES --out RUN [OPTIONS]",
        {
            "IMAGES": "a folder, zip, tar or Parquet file, a text file of paths, or one image",
            "--out RUN": "the folder of the run to write",
            "-k K, --num-clusters K": "how many clusters to find, or auto (default: 27)",
            "--backbone B": "a name of `iddc models`, NAME=FILE or a folder (default: auto)",
            "--recipe NAME": "a recipe of `iddc recipes` (default: folder, for your own images)",
            "--config FILE": "take every number from this file, such as RUN/config.yaml",
            "--method M": "consensus (default), iddc, kmeans, stego or another: docs/methods.md",
            "--seed N": "everything random follows from it (default: 0)",
            **_DEVICE,
            "--limit N": "use the first N images only",
            "--dry-run": "say what would be done, with time and memory; write nothing",
            "--print-config": "print every number as YAML, for --config",
            "--overwrite": "replace an earlier run in RUN",
        },
        ("photos/ -k 12 --out runs/photos", "photos.zip -k 20 --backbone bundled --out runs/zip"),
    ),
    "check": Short(
        "IMAGES [OPTIONS]",
        {
            "IMAGES": "a folder, zip, tar or Parquet file, a text file of paths, or one image",
            "--limit N": "use the first N images only",
            "--include-masks": "read masks and labels among IMAGES like photos",
            **_JSON,
        },
        ("photos/", "tiles/ --limit 100 --json"),
    ),
    "sweep": Short(
        "IMAGES --out DIR [OPTIONS]",
        {
            "IMAGES": "a folder, zip, tar or Parquet file, a text file of paths, or one image",
            "--out DIR": "the folder to write: sweep.html, which works offline",
            "-k K ...": "the numbers of clusters to try (default: 6 9 12 18 27)",
            "--backbone B": "a name of `iddc models`, NAME=FILE or a folder (default: auto)",
            "--seeds N": "how many seeds are compared at each K (default: 3)",
            **_DEVICE,
            **_JSON,
        },
        ("photos/ --out sweep", "photos/ -k 4 8 16 32 --backbone bundled --out sweep"),
    ),
    "compare": Short(
        "IMAGES --data DIR --out DIR [OPTIONS]",
        {
            "IMAGES": "what all methods train on",
            "--data DIR": "the labelled images to score on, as for `iddc evaluate`",
            "--out DIR": "the folder to write: runs, and one table",
            "--methods M ...": "the methods; differences in the table are to the first one",
            "--seeds N": "runs of each method (default: 5)",
            "-k K, --num-clusters K": "how many clusters to find (default: 27)",
            "--backbone B": "a name of `iddc models`, NAME=FILE or a folder (default: auto)",
            **_DEVICE,
        },
        (
            "photos/ --data labelled/ -k 12 --out compared",
            "photos/ --data labelled/ --methods iddc kmeans --seeds 3 --out compared",
        ),
    ),
    "predict": Short(
        "RUN IMAGES --out DIR [OPTIONS]",
        {
            "RUN": "the folder of a finished run",
            "IMAGES": "a folder, a zip, a text file of paths, an image, or a video",
            "--out DIR": "the folder to write, outside of IMAGES",
            "--formats F ...": "png (default) palette overlay csv coco coco-polygons cvat",
            "": "labelstudio labelme yolo npz; for rasters: geotiff geojson gpkg",
            "--refine R": "make masks follow edges: none, fast, or crf",
            "--engine E": "faster on CPUs: onnx or openvino; with --int8 faster still",
            "--shard I/N": "do every N-th image from the I-th on; auto: as the scheduler says",
            "--limit N": "use the first N images only",
            **_DEVICE,
        },
        (
            "runs/photos photos/ --out masks --formats png overlay csv",
            "runs/tiles tiles/ --out masks --formats geotiff gpkg csv",
        ),
    ),
    "relabel": Short(
        "DIR [OPTIONS]",
        {
            "DIR": "the --out of `iddc predict`",
            "--run RUN": "the run whose names are taken, if it was moved",
            "--images IMAGES": "the images, if they were moved",
        },
        ("masks", "masks --run elsewhere/photos"),
    ),
    "evaluate": Short(
        "RUN --data DIR [OPTIONS]",
        {
            "RUN": "the folder of a finished run",
            "--data DIR": "labelled images: DIR/images and DIR/labels, PNGs of class ids",
            "--dataset NAME": "the kind of data set, such as cityscapes (default: folder)",
            "--split NAME": "the part of it (default: val)",
            "--matching M": "names: score clusters also as the classes you named them after",
            "--refine R": "make masks follow edges first: none, fast, or crf",
            "--save-masks": "write image, truth and prediction side by side",
            **_JSON,
        },
        ("runs/photos --data labelled/ --split val", "runs/photos --data labelled/ --save-masks"),
    ),
    "report": Short(
        "RUN [OPTIONS]",
        {
            "RUN": "the folder of a finished run",
            "--out FILE": "the file to write (default: RUN/report.html)",
            "--compare RUN2": "show this run beside the first",
            "--images IMAGES": "what to look at (default: the images of the training)",
            "--samples N": "how many images to show with their masks (default: 12)",
        },
        ("runs/photos", "runs/photos --compare runs/kmeans --out both.html"),
    ),
    "label": Short(
        "RUN [OPTIONS]",
        {
            "RUN": "the folder of a finished run; without an option, a page opens",
            "--set CLUSTER=NAME ...": "name clusters; the same name merges them; ignore: leave out",
            "--colour CLUSTER=#RRGGBB ...": "set colours; 3= restores the default",
            "--undo": "undo the last change",
            "--list": "print the names",
            "--images IMAGES": "what the page shows (default: images of the training)",
        },
        ("runs/photos", "runs/photos --set 3=sky 7=sky 11=ignore"),
    ),
    "baseline": Short(
        "{kmeans,pixels,grey,stego} IMAGES --out RUN [OPTIONS]",
        {
            "IMAGES": "a folder, zip, tar or Parquet file, a text file of paths, or one image",
            "--out RUN": "the folder of the run to write",
            "-k K, --num-clusters K": "how many clusters to find (default: 27)",
            "--backbone B": "a name of `iddc models`, NAME=FILE or a folder (default: auto)",
            "--seed N": "everything random follows from it (default: 0)",
            **_DEVICE,
        },
        (
            "kmeans photos/ -k 12 --out runs/kmeans",
            "pixels photos/ -k 12 --out runs/pixels",
        ),
    ),
    "pretrain": Short(
        "IMAGES... --out DIR [OPTIONS]",
        {
            "IMAGES...": "folders, zips, text files of paths, or images",
            "--out DIR": "the weights folder to write, for `train --backbone DIR`",
            "--method M": "contrast, for networks with stages, or dino, for plain ViTs",
            "--network NAME": "a network of timm (default: resnet18)",
            "--steps N": "how many batches are seen (default: 2200)",
            "--batch-size N": "images in a batch, over all processes",
            **_DEVICE,
        },
        (
            "photos/ --out backbones/mine",
            "a/ b.zip --method dino --network vit_small_patch16_224 --out backbones/vit",
        ),
    ),
    "analyze": Short(
        "IMAGES --out DIR [OPTIONS]",
        {
            "IMAGES": "a folder, zip, tar or Parquet file, a text file of paths, or one image",
            "--out DIR": "the folder to write",
            "--data DIR": "a labelled data set to draw beside it; the estimate never sees it",
            "-k K, --num-clusters K": "how many clusters (default: 27)",
            "--backbone B": "a name of `iddc models`, NAME=FILE or a folder (default: auto)",
            **_JSON,
        },
        ("photos/ --out affinities", "photos/ --data labelled/ --out affinities"),
    ),
    "export": Short(
        "RUN --to {onnx,torch-export} --out FILE [OPTIONS]",
        {
            "RUN": "the folder of a finished run",
            "--to FORMAT": "onnx (extra `export`) or torch-export",
            "--out FILE": "the file to write, .onnx or .pt2",
            "--int8 [IMAGES ...]": "compute in 8 bits: a quarter of the size",
            "--check [IMAGES ...]": "compare FILE with PyTorch on 8 images before it is written",
        },
        (
            "runs/photos --to onnx --out model.onnx --check",
            "runs/photos --to torch-export --out model.pt2",
        ),
    ),
    "import": Short(
        "FILE --recipe NAME --out RUN [OPTIONS]",
        {
            "FILE": "a checkpoint that other authors released",
            "--recipe NAME": "the recipe that it was trained with (`iddc recipes`)",
            "--out RUN": "the folder of the run to write",
        },
        (
            "iddc.ckpt --recipe cocostuff27-vits16-released --out runs/released",
            "iddc.ckpt --recipe cityscapes-vits8 --out runs/city",
        ),
    ),
    "reproduce": Short(
        "TABLE --out DIR [OPTIONS]",
        {
            "TABLE": "a table or a figure of the paper, such as table1 or fig7",
            "--data DIR": "the data set, as downloaded",
            "--out DIR": "the folder to write",
            "--rows ROW ...": "names of rows, or patterns such as vits8*",
            "--seeds N": "runs of each row (default: 5)",
            "--smoke": "try everything on drawn scenes, in minutes",
        },
        (
            "table6 --data cocostuff/ --out results --seeds 1",
            "table1 --smoke --out /tmp/smoke",
        ),
    ),
    "recipes": Short("[OPTIONS]", _JSON, ("", "--json")),
    "models": Short("[OPTIONS]", _JSON, ("", "--json")),
    "doctor": Short("[OPTIONS]", _JSON, ("", "--json")),
    "verify": Short(
        "[OPTIONS]", {"--seed N": "what is drawn (default: 0)", **_DEVICE}, ("", "--device cuda")
    ),
    "bench": Short(
        "--out DIR [OPTIONS]",
        {
            "--out DIR": "the folder to write",
            "--parts P ...": "what is measured, such as loss step prediction (default: all)",
            **_DEVICE,
        },
        ("--out bench", "--out bench --parts loss step"),
    ),
    "demo": Short(
        "[OPTIONS]",
        {"--out DIR": "the folder to write (default: runs/demo)"},
        ("", "--out /tmp/demo"),
    ),
}


def short_help(name: str, summary: str) -> str:
    """The help of a command within 25 lines.

    Args:
        name: A command of `TEXTS`.
        summary: The first line of its docstring.
    """
    text = TEXTS[name]
    width = max(map(len, text.options)) + 2
    lines = [f"usage: iddc {name} {text.usage}", "", summary, ""]
    lines += [f"  {option:{width}}{what}" for option, what in text.options.items()]
    lines += ["", "Examples:"]
    lines += [f"  iddc {name} {example}".rstrip() for example in text.examples]
    return "\n".join([*lines, "", "-hh or --help-all lists everything."])


def overview(summaries: Mapping[str, str]) -> str:
    """The help of iddc: every command with its first line, by what people want to do."""
    named = {name for group in GROUPS.values() for name in group}
    rest = tuple(name for name in summaries if name not in named)
    lines = ["usage: iddc COMMAND [OPTIONS]", ""]
    lines += ["Learn semantic segmentation from a folder of images, without any label."]
    for title, group in {**GROUPS, "Also": rest}.items():
        there = [name for name in group if name in summaries]
        if there:
            lines += ["", f"{title}:", *(f"  {name:10} {summaries[name]}" for name in there)]
    lines += ["", "iddc COMMAND -h shows the options that one needs, and -hh all of them."]
    return "\n".join([*lines, "iddc --version prints the version."])
