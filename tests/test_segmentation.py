"""What a person in a notebook does with the segments of one image, read back by other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as cocomask

from iddc import Segmenter
from iddc.errors import ConfigError
from iddc.masks import Labels
from iddc.segmentation import Segmentation
from tiny import tiny_segmenter

pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning:pycocotools")
CLUSTERS = np.array([[0, 1, 2, 3], [2, 2, 2, 2]], np.uint8)


@pytest.fixture
def result() -> Segmentation:
    """Cluster 0 and 2 are sky, 1 is <tree>, 3 is ignored."""
    labels = Labels.numbered(4).edit({0: "sky", 2: "sky", 1: "<tree>", 3: "ignore"})
    return Segmentation(Image.new("RGB", (4, 2), (9, 9, 9)), CLUSTERS, labels)


def test_shares_are_of_all_pixels_the_largest_first(result: Segmentation) -> None:
    assert result.shares == {"sky": 6 / 8, "<tree>": 1 / 8, "ignore": 1 / 8}
    assert next(iter(result.shares)) == "sky"


def test_names_are_by_cluster_and_class_names_by_class(result: Segmentation) -> None:
    assert [result.names[c] for c in (0, 1, 2, 3)] == ["sky", "<tree>", "sky", "ignore"]
    assert [result.class_names[c] for c in result.classes[0, :3]] == ["sky", "<tree>", "sky"]


def test_masks_are_saved_as_ids_with_a_palette_or_laid_over(
    result: Segmentation, tmp_path: Path
) -> None:
    for kind, mode in (("ids", "L"), ("palette", "P"), ("overlay", "RGB")):
        path = tmp_path / "deep" / f"{kind}.png"
        result.save(path, kind)  # type: ignore[arg-type]
        with Image.open(path) as image:
            assert image.mode == mode
            if kind != "overlay":
                assert np.asarray(image).tolist() == [[0, 1, 0, 255], [0, 0, 0, 0]]
    result.save(tmp_path / "overlay.jpg", "overlay")
    with pytest.raises(ConfigError, match=r"ends in .png, found 'mask.jpg'"):
        result.save(tmp_path / "mask.jpg")


def test_a_coco_record_holds_every_class_as_pycocotools_reads_it(result: Segmentation) -> None:
    record = result.to_coco("a.jpg")
    assert record["images"] == [{"id": 1, "file_name": "a.jpg", "width": 4, "height": 2}]
    assert [category["name"] for category in record["categories"]] == ["sky", "<tree>"]
    found = np.full(CLUSTERS.shape, 255)
    for annotation in record["annotations"]:
        assert annotation["image_id"] == 1
        found[cocomask.decode(annotation["segmentation"]) == 1] = annotation["category_id"] - 1
    assert (found == result.classes).all()


def test_notebooks_show_it_with_names_as_text(result: Segmentation) -> None:
    assert repr(result) == "Segmentation(4 x 2: sky 75%, <tree> 12%, ignore 12%)"
    page = result._repr_html_()
    assert page.startswith('<img src="data:image/jpeg;base64,')
    assert "&lt;tree&gt; 12.5%" in page
    assert "<tree>" not in page


@pytest.mark.parametrize("key", [1, "1", np.int64(1), np.uint8(1)])
def test_clusters_are_renamed_by_whole_numbers_of_any_kind(key: Any) -> None:
    segmenter = tiny_segmenter(3)
    segmenter.rename({key: "sky"})
    assert segmenter.labels.names == ("cluster 0", "sky", "cluster 2")


@pytest.mark.parametrize("key", ["sky", 1.5, None, "1.0"])
def test_what_is_no_number_of_a_cluster_is_said_in_python_s_words(key: Any) -> None:
    with pytest.raises(ConfigError, match="rename: expected the number of a cluster"):
        tiny_segmenter(3).rename({key: "sky"})


def test_a_segmenter_says_what_it_is_and_whether_it_is_trained() -> None:
    assert repr(Segmenter(12)) == "Segmenter(12 clusters, auto, folder; not trained yet, call fit)"
    segmenter = tiny_segmenter(3)
    segmenter.rename({0: "sky"})
    assert repr(segmenter).endswith("; trained, 1 of 3 clusters named)")
