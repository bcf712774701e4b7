"""Mask files that say what cannot be, each beside the nearest one that can."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from methods_multimodal.dissection import Concepts
from methods_multimodal.dissection._coco import _decoded, read_document
from methods_multimodal.dissection.concepts import presence, shares, stacked
from methods_multimodal.dissection.masks import read_coco, read_index_maps
from mm_adapters import InputError

_DOCUMENT: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 4, "height": 3},
        {"id": 2, "file_name": "folder/b.png", "width": 4, "height": 3},
    ],
    "categories": [{"id": 7, "name": "box", "supercategory": "thing"}, {"id": 8, "name": "sky"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
        {"id": 2, "image_id": 1, "category_id": 7, "segmentation": {"size": [3, 4], "counts": [9, 3]}},
        {"id": 3, "image_id": 2, "category_id": 8, "segmentation": {"size": [3, 4], "counts": "0<"}},
    ],
}


def _file(folder: Path, change: Callable[[Any], Any] | None = None) -> Path:
    document = copy.deepcopy(_DOCUMENT)
    if change is not None:
        change(document)
    path = folder / "coco.json"
    path.write_text(json.dumps(document))
    return path


def _set(kind: str, number: int, **values: Any) -> Callable[[Any], Any]:
    return lambda document: document[kind][number].update(values)


def _without(kind: str, number: int, key: str) -> Callable[[Any], Any]:
    return lambda document: document[kind][number].pop(key)


_image = "images[0]"
_mask = "annotations[1]: its "


_WRONG_ENTRIES: list[Any] = [
    (lambda d: d.pop("images"), "coco.json has no list of objects 'images', so it is no COCO annotation"),
    (lambda d: d.update(categories={}), "coco.json has no list of objects 'categories'"),
    (lambda d: d["annotations"].append(3), "coco.json has no list of objects 'annotations'"),
    (_without("images", 0, "id"), f"{_image} has no id."),
    (_set("images", 0, id="1"), f"{_image} has '1' for its id."),
    (_set("images", 0, id=True), f"{_image} has True for its id."),
    (_set("images", 0, file_name=""), f"{_image} has '' for its file_name."),
    (_set("images", 0, width=0), f"{_image}: its width and height are 0 and 3."),
    (_set("images", 0, height=0), f"{_image}: its width and height are 4 and 0."),
    (_set("images", 1, height=10**6 + 1), "images[1]: its width and height are 4 and 1000001."),
    (_set("images", 1, id=1), "images[1]: its id 1 is another image's too."),
    (_set("categories", 0, supercategory=3), "categories[0]: its supercategory is 3, and is a name."),
    (_set("categories", 1, id=7), "categories[1]: its id 7 is another category's too."),
    (_set("annotations", 0, image_id=3), "annotations[0] is of the image 3, which is not listed."),
    (_set("annotations", 0, category_id=9), "annotations[0] is of the category 9, which is not listed."),
    (_set("annotations", 2, id=2), "annotations[2]: its id 2 is another annotation's too."),
    (_set("annotations", 0, segmentation=[]), "annotations[0]: its segmentation is empty."),
    (_set("annotations", 0, segmentation=[[0] * 5]), "a polygon is a list of at least three x, y pairs."),
    (_set("annotations", 0, segmentation=[[0] * 7]), "a polygon is a list of at least three x, y pairs."),
    (_set("annotations", 0, segmentation=[3]), "a polygon is a list of at least three x, y pairs."),
    (_set("annotations", 0, segmentation=[[0, 0, 1, 0, 1, "1"]]), "a polygon holds what is no finite"),
    (_set("annotations", 0, segmentation=[[0, 0, 1, 0, 1, True]]), "a polygon holds what is no finite"),
    (_set("annotations", 0, segmentation=[[0, 0, 1, 0, 1, 1e400]]), "a polygon holds what is no finite"),
    (_set("annotations", 0, segmentation=[[0, 0, 1, 0, 1, -1e7]]), "a polygon holds what is no finite"),
    (
        _set("annotations", 1, segmentation={"size": [4, 3], "counts": [9, 3]}),
        f"{_mask}segmentation is neither polygons nor runs of an image of 4 x 3.",
    ),
    (_set("annotations", 1, segmentation=None), f"{_mask}segmentation is neither polygons nor runs"),
    (_set("annotations", 1, segmentation={"size": [3, 4]}), f"{_mask}runs are no lengths."),
    (
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": [13, -1]}),
        f"{_mask}runs are no lengths.",
    ),
    (
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": [12, True]}),
        f"{_mask}runs are no lengths.",
    ),
    (
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": "p"}),
        f"{_mask}runs are no lengths.",
    ),
    (
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": [9, 4]}),
        f"{_mask}runs cover 13 of 12 pixels.",
    ),
    (
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": ";"}),
        f"{_mask}runs cover 11 of 12 pixels.",
    ),
]


def test_an_entry_that_cannot_be_is_named(tmp_path: Path) -> None:
    for change, told in _WRONG_ENTRIES:
        with pytest.raises(InputError, match=re.escape(told)):
            read_document(_file(tmp_path, change))


@pytest.mark.parametrize(
    "change",
    [
        None,
        _set("images", 1, width=10**6, height=1, id=3),
        _set("categories", 0, supercategory=None),
        _set("annotations", 0, segmentation=[[0, 0, 1, 0, 1, 9_999_999.5], [0] * 8]),
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": [0, 12]}),
        _set("annotations", 1, segmentation={"size": [3, 4], "counts": "<0"}),
    ],
)
def test_what_is_just_inside_is_read(tmp_path: Path, change: Callable[[Any], Any] | None) -> None:
    path = _file(tmp_path, change)
    document = json.loads(path.read_text())
    if change is not None and document["images"][1]["id"] == 3:  # Its only mask was of the other size.
        document["annotations"].pop()
        path.write_text(json.dumps(document))
    assert read_document(path) == document


def test_compressed_runs_are_decoded_as_coco_encodes_them() -> None:
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    squares = np.zeros((70, 60), bool)
    squares[5:60, 40:58] = True  # Runs of more than one letter, with differences below zero.
    for picture in (rng.random((9, 11)) < 0.5, rng.random((70, 60)) < 0.01, squares, ~squares, squares[:1]):
        flat = picture.flatten(order="F")
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *ends, len(flat)]).tolist()
        runs = [0, *runs] if flat[0] else runs
        text = mask.encode(np.asfortranarray(picture.astype(np.uint8)))["counts"].decode()
        assert _decoded(text) == runs


_RUNS: list[Any] = [
    ("", []),
    ("0", [0]),
    ("?", [15]),  # The largest of one letter.
    ("@", [-16]),  # Bit 16 is the sign.
    ("O", [-1]),
    ("1234", [1, 2, 3, 6]),  # From the fourth on, what is added to the one but last.
    ("12345", [1, 2, 3, 6, 8]),
    ("P1", [32]),
    ("Q1", [33]),
    ("oo0", [31 + 31 * 32]),
    ("P" * 12 + "0", [0]),
    ("P" * 13 + "0", None),
    ("P", None),  # It says that another letter follows.
    ("/", None),
    ("/0", None),
    ("p", None),
    ("0p", None),
]


def test_a_letter_of_runs_holds_five_bits() -> None:
    for text, runs in _RUNS:
        assert _decoded(text) == runs


def test_masks_of_one_category_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    for name in "ab":
        Image.new("RGB", (4, 3)).save(tmp_path / f"{name}.png")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    masks, concepts = read_coco(_file(tmp_path), files)
    assert (concepts.names, concepts.categories) == (("box", "sky"), ("thing", "object"))
    box = np.zeros((3, 4), bool)
    box[:2, :2] = True
    box[:, 3] = True
    assert [set(m) for m in masks] == [{"box"}, {"sky"}]
    assert (masks[0]["box"] == box).all()
    assert masks[1]["sky"].all()
    path = _file(tmp_path, _set("images", 1, file_name="other/a.png"))
    with pytest.raises(InputError, match=r"coco\.json has two images a\.png; images are found by the names"):
        read_coco(path, files[:1])
    for missing, told in ((5, r"0\.png, .*, 4\.png\.$"), (6, r"0\.png, .*, 4\.png \.\.\.\.$")):
        with pytest.raises(InputError, match=rf"has no image {told}"):
            read_coco(_file(tmp_path), [*files, *(tmp_path / f"{i}.png" for i in range(missing))])
    Image.new("RGB", (3, 4)).save(files[0])
    with pytest.raises(InputError, match=r"coco\.json says a\.png is 4 x 3; .*a\.png is 3 x 4\.$"):
        read_coco(_file(tmp_path), files)
    assert len(read_coco(_file(tmp_path), files[1:])[0]) == 1
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(InputError, match=r"need pycocotools: pip install mm-interp\[coco\]"):
        read_coco(_file(tmp_path), files[1:])


def _legend(folder: Path, legend: Any) -> None:
    (folder / "legend.json").write_text(json.dumps(legend))


@pytest.mark.parametrize(
    ("legend", "named"),
    [
        ({"colour": []}, "colour"),
        ({"shape": {"1": "box"}, "colour": {"a": "red"}}, "colour"),
        ({"colour": {"-1": "red"}}, "colour"),
        ({"colour": {"1": 2}}, "colour"),
        ({" ": {"1": "red"}}, " "),
        ({"a/b": {"1": "red"}}, "a/b"),
        ({"..": {"1": "red"}, "a/": {"1": "red"}}, "a/"),
    ],
)
def test_a_legend_is_categories_of_numbers_of_concepts(tmp_path: Path, legend: Any, named: str) -> None:
    with pytest.raises(InputError, match=r" has no legend\.json\. .*\{\"colour\": \{\"1\": \"red\"\}\}\.$"):
        read_index_maps(tmp_path, [])
    _legend(tmp_path, legend)
    told = f"legend.json is not {{category: {{number: concept}}}} in JSON: {named!r}."
    with pytest.raises(InputError, match=re.escape(told)):
        read_index_maps(tmp_path, [])
    _legend(tmp_path, {"colour": {"1": "red", "20": "blue"}, "shape": {"1": "box"}})
    assert read_index_maps(tmp_path, []) == (
        [],
        Concepts(("red", "blue", "box"), ("colour", "colour", "shape")),
    )


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16", "1", "RGB", "LA"])
def test_an_index_map_has_one_number_a_pixel(tmp_path: Path, mode: str) -> None:
    (tmp_path / "maps").mkdir()
    _legend(tmp_path / "maps", {"colour": {"1": "red"}})
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    numbers = Image.new(mode, (4, 3))
    if mode in ("RGB", "LA"):
        numbers.save(tmp_path / "maps" / "a.png")
        with pytest.raises(InputError, match=rf"maps/a\.png is {mode}: an index map has one number a pixel"):
            read_index_maps(tmp_path / "maps", [tmp_path / "a.png"])
        return
    numbers.putpixel((3, 1), 1)
    numbers.save(tmp_path / "maps" / "a.png", format="TIFF" if mode == "I" else "PNG")  # PNG has no 32 bits.
    ((masks,), _) = read_index_maps(tmp_path / "maps", [tmp_path / "a.png"])
    assert np.argwhere(masks["red"]).tolist() == [[1, 3]]


def test_concepts_are_names_in_as_many_categories() -> None:
    assert len(Concepts(("red",), ("colour",))) == 1
    with pytest.raises(InputError, match=r"^There are no concepts\.$"):
        Concepts((), ())
    for categories in ((), ("colour", "colour")):
        with pytest.raises(InputError, match=f"^1 concepts have {len(categories)} categories"):
            Concepts(("red",), categories)


def test_masks_of_one_picture_are_of_one_size() -> None:
    concepts = Concepts(("red", "blue", "box"), ("colour", "colour", "shape"))
    half = np.array([[True, False], [True, False]])
    present, where = stacked({"box": half, "red": ~half}, concepts)
    assert present == [2, 0]
    assert where.tolist() == [half.tolist(), (~half).tolist()]
    with pytest.raises(InputError, match=r"differ in size: \[\(2, 2\), \(2, 3\)\]\.$"):
        stacked({"box": half, "red": np.ones((2, 3), bool)}, concepts)
    present, where = stacked({}, concepts)
    assert present == []
    assert where.shape == (0, 1, 1)
    assert shares([{}, {"blue": half}], concepts, (1, 2)).tolist() == [
        [[[0, 0]]] * 3,
        [[[0, 0]], [[1, 0]], [[0, 0]]],
    ]
    assert presence([{}, {"blue": half}], concepts, 0.49).tolist() == [[False] * 3, [False, True, False]]
    assert not presence([{"blue": half}], concepts, 0.5).any()
