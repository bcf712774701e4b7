"""CLIP-Dissect over a store: streamed equals in memory, a killed run goes on, and masks in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm_adapters as mm
from methods_multimodal.dissection import Units, clip_dissect, collect, embed_concepts, naming, read_concepts
from methods_multimodal.dissection.masks import read_masks
from methods_multimodal.dissection.naming import JUDGE
from methods_multimodal.dissection.similarity import KERNELS
from mm_adapters import InputError, StoreError
from mm_adapters.store import Column, Store, Writer
from mm_adapters.zoo import labels, measures, world


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: Any) -> tuple[Store, torch.Tensor]:
    """A store in several shards, and embeddings of 70 concepts."""
    made = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("store") / "probe"
    with Writer(folder, {"site": Column((9,)), JUDGE: Column((16,))}, {}, shard_bytes=4096) as writer:
        for _ in range(10):
            seen = torch.nn.functional.normalize(torch.randn(30, 16, generator=made), dim=1)
            writer.append({"site": torch.randn(30, 9, generator=made), JUDGE: seen}, items=30)
    return Store(folder), torch.nn.functional.normalize(torch.randn(70, 16, generator=made), dim=1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_streamed_scores_equal_those_in_memory(kernel: str, simulated: tuple[Store, torch.Tensor]) -> None:
    store, texts = simulated
    rows = store.rows()
    names = [f"c{i}" for i in range(len(texts))]
    found = clip_dissect(store, "site", texts, names, kernel=kernel, progress=False)
    whole = KERNELS[kernel](rows[JUDGE] @ texts.T, rows["site"])
    torch.testing.assert_close(found.scores, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_unknown_kernels_and_names_are_errors(simulated: tuple[Store, torch.Tensor]) -> None:
    store, texts = simulated
    with pytest.raises(InputError, match="No kernel 'pmi'"):
        clip_dissect(store, "site", texts, ["a"] * 70, kernel="pmi")
    with pytest.raises(InputError, match="3 names and 70"):
        clip_dissect(store, "site", texts, ["a"] * 3)
    with pytest.raises(InputError, match="top 400 of 300"):
        clip_dissect(store, "site", texts, ["a"] * 70, top_k=400, progress=False)


def _batches(model: mm.HookedModel, n: int) -> list[Any]:
    pictures = measures.images_of([world.scene(i, "test", kind="one") for i in range(4 * n)])
    parts = [pictures[4 * i : 4 * i + 4] for i in range(n)]
    return [({"text": ["a"], "images": part}, part) for part in parts]


def test_a_run_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    model = mm.load("tiny-clip")
    units = [Units(model, "vision.blocks.2.mlp.hook_post"), Units(model, "vision.blocks.3.attn.hook_z")]
    batches = _batches(model, 5)
    whole = collect(units, batches, model, tmp_path / "whole", progress=False)
    calls: list[int] = []
    real = naming.embed

    def counts(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*args, **options)

    def dies(*args: Any, **options: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counts(*args, **options)

    monkeypatch.setattr(naming, "SHARD_BYTES", 1)
    monkeypatch.setattr(naming, "embed", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(units, batches, model, tmp_path / "killed", progress=False)
    calls.clear()
    monkeypatch.setattr(naming, "embed", counts)
    again = collect(units, batches, model, tmp_path / "killed", progress=False)
    assert len(calls) == 2  # Those that were not stored.
    for name, rows in whole.rows().items():
        assert torch.equal(rows, again.rows()[name])
    calls.clear()
    collect(units, batches, model, tmp_path / "killed", progress=False)
    assert not calls
    with pytest.raises(StoreError):
        collect(units, batches[:4], model, tmp_path / "killed", progress=False)


def test_streamed_embeddings_are_the_judge_s(tmp_path: Path) -> None:
    model = mm.load("tiny-clip")
    batches = _batches(model, 2)
    store = collect([Units(model, "vision.blocks.0.hook_mlp_out")], batches, model, tmp_path, progress=False)
    said = embed_concepts(model, ["red", "circle"], "a photo of a {} object")
    cosines = store.rows()[JUDGE] @ said.T
    out = model(
        text=["a photo of a red object", "a photo of a circle object"],
        images=[p for _, part in batches for p in part],
    )
    wanted = out.logits_per_image / model.wrapped.logit_scale.exp()
    torch.testing.assert_close(cosines, wanted.detach(), rtol=1e-4, atol=1e-5)


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures and their index maps of colours and shapes."""
    (tmp_path / "images").mkdir()
    legend: dict[str, dict[str, str]] = {
        c: {str(i + 1): n for i, n in enumerate(labels.CATEGORIES[c])} for c in ("shape", "colour")
    }
    for category in legend:
        (tmp_path / "masks" / category).mkdir(parents=True)
    (tmp_path / "masks" / "legend.json").write_text(json.dumps(legend))
    for i in range(6):
        scene = world.scene(i, "test", kind="two")
        Image.fromarray(world.render(scene)).save(tmp_path / "images" / f"{i}.png")
        for category, names in legend.items():
            numbers = np.zeros((64, 64), np.uint8)
            for number, name in names.items():
                numbers[labels.masks_of(scene).get(name, np.zeros((64, 64), bool))] = int(number)
            Image.fromarray(numbers).save(tmp_path / "masks" / category / f"{i}.png")
    return tmp_path


def test_index_maps_are_read_as_the_masks_they_are(folder: Path) -> None:
    images = sorted((folder / "images").iterdir())
    masks, concepts = read_masks(folder / "masks", images)
    assert concepts.names == labels.CATEGORIES["shape"] + labels.CATEGORIES["colour"]
    for i, shown in enumerate(masks):
        truth = labels.masks_of(world.scene(i, "test", kind="two"))
        assert shown.keys() == truth.keys() & set(concepts.names)
        assert all((mask == truth[name]).all() for name, mask in shown.items())


def test_coco_masks_are_read_as_the_polygons_they_are(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    square = [2, 2, 8, 2, 8, 8, 2, 8]
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
        "categories": [{"id": 7, "name": "box", "supercategory": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [square], "area": 36,
             "bbox": [2, 2, 6, 6], "iscrowd": 0}
        ],
    }  # fmt: skip
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco))
    masks, concepts = read_masks(path, [tmp_path / "a.png"])
    assert (concepts.names, concepts.categories) == (("box",), ("thing",))
    wanted = np.zeros((10, 20), bool)
    wanted[2:8, 2:8] = True
    assert (masks[0]["box"] == wanted).all()
    with pytest.raises(InputError, match=r"has no image b\.png"):
        read_masks(path, [tmp_path / "b.png"])


def test_masks_that_do_not_fit_name_their_file(folder: Path) -> None:
    images = sorted((folder / "images").iterdir())
    bad = folder / "masks" / "colour" / "3.png"
    Image.open(bad).resize((32, 32)).save(bad)
    with pytest.raises(InputError, match=r"colour/3\.png is 32 x 32"):
        read_masks(folder / "masks", images)
    bad.unlink()
    with pytest.raises(InputError, match=r"3\.png has no index map"):
        read_masks(folder / "masks", images)
    (folder / "masks" / "legend.json").write_text("[]")
    with pytest.raises(InputError, match=r"legend\.json holds a list"):
        read_masks(folder / "masks", images)


def test_concept_lists_with_empty_or_double_lines_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "concepts.txt"
    path.write_text("colour\tred\nblue\n")
    found = read_concepts(path)
    assert (found.names, found.categories) == (("red", "blue"), ("colour", "concept"))
    path.write_text("red\n\nblue\n")
    with pytest.raises(InputError, match="line 2 is empty"):
        read_concepts(path)
    path.write_text("red\nblue\nred\n")
    with pytest.raises(InputError, match="line 3: 'red' is also line 1"):
        read_concepts(path)


def test_the_command_writes_a_page_and_the_numbers_behind_it(folder: Path) -> None:
    from mm_adapters.cli import build

    out = folder / "out"
    arguments = ["dissect", "--site", "vision.blocks.1.attn.hook_z", "--images", str(folder / "images"),
                 "--masks", str(folder / "masks"), "--batch", "2", "--cards", "4",
                 "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(build(), arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    numbers = json.loads((out / "units.json").read_text())
    assert len(numbers["units"]) == 128
    assert {"network", "soft_wpmi", "cosine", "network_auroc"} <= numbers["units"][0].keys()
    lines = (out / "units.csv").read_text().splitlines()
    assert len(lines) == 129
    page = (out / "index.html").read_text()
    assert page.count('class="unit"') == 4
    assert "http" not in page.replace("<!doctype html>", "")
