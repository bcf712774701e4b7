"""Naming heads: on a world whose truth is known the names are right, and a killed run ends the same."""

from __future__ import annotations

import importlib
import itertools
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mm_adapters as mm
from methods_multimodal.text_explanations.decomposition import decompose
from methods_multimodal.text_explanations.name_heads import HeadNames, name_heads
from methods_multimodal.text_explanations.text_span import text_span
from methods_multimodal.text_explanations.vocabulary import (
    Vocabulary,
    attribute_templates,
    vocabulary,
)
from mm_adapters.zoo import world
from mm_adapters.zoo.measures import images_of, value_of, values

ATTRIBUTES = ("shape", "colour", "background", "position", "size", "texture")


@cache
def clip() -> mm.HookedModel:
    return mm.load("tiny-clip")


@cache
def seen(n: int = 250) -> tuple[list[world.Scene], torch.Tensor]:
    scenes = [world.scene(i, "validation", kind="one") for i in range(n)]
    return scenes, clip().prepare(images=images_of(scenes))["pixel_values"]


def explained(outputs: np.ndarray, scenes: list[world.Scene], attribute: str) -> float:
    """R2 of a regression of the outputs on an attribute's true values."""
    table = np.zeros((len(scenes), len(values(attribute))))
    for row, scene in enumerate(scenes):
        table[row, values(attribute).index(value_of(scene, attribute))] = 1
    centred, x = outputs - outputs.mean(0), table - table.mean(0)
    fitted = x @ np.linalg.lstsq(x, centred, rcond=None)[0]
    return 1 - float(((centred - fitted) ** 2).sum() / (centred**2).sum())


def test_heads_are_named_by_the_attribute_that_truly_drives_them() -> None:
    scenes, pixels = seen()
    found = name_heads(clip(), pixels, vocabulary("world"), n_texts=3, top=1, batch_size=100)
    outputs = decompose(clip(), images=pixels, tokens="sum", batch_size=100).unit().heads[:, :, 0].numpy()
    with_one, named = [], []
    for layer in range(outputs.shape[1]):
        for head in range(outputs.shape[2]):
            r2 = {a: explained(outputs[:, layer, head], scenes, a) for a in ATTRIBUTES}
            best = max(r2, key=lambda a: r2[a])
            if r2[best] > 0.3:
                with_one.append((layer, head))
                named.append(best in found.about(layer, head))
    assert len(with_one) >= 10
    assert np.mean(named) >= 0.8, [h for h, ok in zip(with_one, named, strict=True) if not ok]


def test_the_images_furthest_along_a_text_are_as_it_says() -> None:
    scenes, pixels = seen()
    found = name_heads(clip(), pixels, vocabulary("world"), n_texts=1, top=4, batch_size=100)
    outputs = decompose(clip(), images=pixels, tokens="sum", batch_size=100).unit().heads[:, :, 0].numpy()
    attributes = set()
    for layer, head in itertools.product(range(outputs.shape[1]), range(outputs.shape[2])):
        if not found.is_named(layer, head):
            continue
        r2 = {a: explained(outputs[:, layer, head], scenes, a) for a in ATTRIBUTES}
        attribute = max(r2, key=lambda a: r2[a])
        attributes.add(attribute)
        (text,) = found.names(layer, head)
        shown = [value_of(scenes[i], attribute) for i in found.top_images[layer, head, 0].tolist()]
        assert all(value in text for value in shown), (text, shown)
    assert len(attributes) >= 2


def test_names_from_the_stream_are_those_of_text_span_on_the_whole_data() -> None:
    pixels = seen()[1][:120]
    words = vocabulary("world")
    found = name_heads(clip(), pixels, words, n_texts=5, top=3, batch_size=37)
    outputs = decompose(clip(), images=pixels, tokens="sum", batch_size=100).unit().heads[:, :, 0]
    own = decompose(clip(), images=pixels, tokens="sum", batch_size=100).unit().own
    texts = torch.nn.functional.normalize(clip().embed(text=list(words.texts)).detach(), dim=-1)
    for layer, head in ((0, 2), (2, 0), (3, 1), (3, 3)):
        whole = text_span(outputs[:, layer, head], texts, 80, 5)
        assert found.chosen[layer, head].tolist() == list(whole.chosen)
        along = whole.coordinates(outputs[:, layer, head])
        assert found.top_images[layer, head].tolist() == along.topk(3, dim=0).indices.T.tolist()
        torch.testing.assert_close(
            found.scores[layer, head], along.topk(3, dim=0).values.T, rtol=1e-3, atol=1e-5
        )
        share = outputs[:, layer, head].var(0, unbiased=False).sum() / own.var(0, unbiased=False).sum()
        assert float(found.variance[layer, head]) == pytest.approx(float(share), rel=1e-3)


def write_images(folder: Path, n: int) -> list[Path]:
    folder.mkdir()
    scenes = [world.scene(i, "validation", kind="one") for i in range(n)]
    files = [folder / f"{i:03d}.png" for i in range(n)]
    for file, image in zip(files, images_of(scenes), strict=True):
        image.save(file)
    return files


@pytest.mark.parametrize("stage", ["what heads write", "images furthest along"])
def test_a_run_that_was_killed_goes_on_to_the_same_result(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from methods_multimodal.core import progress as _progress

    module = importlib.import_module("methods_multimodal.text_explanations.name_heads")
    files = write_images(tmp_path / "images", 60)
    options: dict[str, Any] = {"n_texts": 3, "top": 2, "batch_size": 8, "every": 2}
    whole = name_heads(clip(), files, vocabulary("world"), folder=tmp_path / "a", **options)

    plain, read, counts = _progress.run_pass, [], {}

    def dying(items: Any, step: Any, start: Any, *, label: str, **rest: Any) -> Any:
        def counted(state: Any, images: Any, numbers: list[int]) -> Any:
            if label == stage and numbers[0] == 40 and not read:
                read.append(numbers)
                raise KeyboardInterrupt
            counts[label] = counts.get(label, 0) + len(numbers)
            return step(state, images, numbers)

        return plain(items, counted, start, label=label, **rest)

    monkeypatch.setattr(module, "run_pass", dying)
    with pytest.raises(KeyboardInterrupt):
        name_heads(clip(), files, vocabulary("world"), folder=tmp_path / "b", **options)
    before = dict(counts)
    again = name_heads(clip(), files, vocabulary("world"), folder=tmp_path / "b", **options)
    assert read == [list(range(40, 48))]
    assert before[stage] == 40
    assert counts[stage] - before[stage] == 20  # Nothing is done twice.
    assert torch.equal(again.chosen, whole.chosen)
    assert torch.equal(again.variance_explained, whole.variance_explained)
    assert torch.equal(again.scores, whole.scores)
    assert torch.equal(again.top_images, whole.top_images)
    assert again.top_files == whole.top_files


def test_an_image_that_cannot_be_read_is_named_and_skipped_only_if_asked(tmp_path: Path) -> None:
    files = write_images(tmp_path / "images", 20)
    good = [f for i, f in enumerate(files) if i != 11]
    files[11].write_bytes(files[11].read_bytes()[:100])
    options: dict[str, Any] = {"n_texts": 2, "top": 2, "batch_size": 5}
    with pytest.raises(mm.InputError, match=r"011\.png.*skip_unreadable"):
        name_heads(clip(), files[0].parent, vocabulary("world"), folder=tmp_path / "out", **options)
    found = name_heads(
        clip(), files[0].parent, vocabulary("world"), folder=tmp_path / "out", skip_unreadable=True, **options
    )
    ((name, why),) = found.unreadable
    assert name == str(files[11])
    assert "truncated" in why
    assert found.n_images == 19
    with pytest.raises(mm.InputError, match=r"011\.png.*skip_unreadable"):  # What was skipped is not hidden.
        name_heads(clip(), files[0].parent, vocabulary("world"), folder=tmp_path / "out", **options)
    assert 11 not in found.top_images
    without = name_heads(clip(), good, vocabulary("world"), **options)
    assert torch.equal(found.chosen, without.chosen)
    torch.testing.assert_close(found.scores, without.scores, rtol=1e-4, atol=1e-5)


def test_another_runs_progress_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    _, pixels = seen()
    name_heads(clip(), pixels[:20], vocabulary("world"), n_texts=2, folder=tmp_path)
    with pytest.raises(mm.StoreError, match="data differ"):
        name_heads(clip(), pixels[:24], vocabulary("world"), n_texts=2, folder=tmp_path)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_engines_name_alike(name: str) -> None:
    import tiny

    from mm_adapters.traced import TracedModel

    pixels, words = tiny.pixels(12), Vocabulary(("a", "b", "c"), ("a", "b", "c"), ("", "", ""))
    made = []
    for build in (mm.HookedModel, TracedModel):
        built = tiny.CASES[name]()
        tokenizer = tiny.letter_tokenizer(16)
        model = mm.wrap(
            built.model, tokenizer=tokenizer, engine="hooked" if build is mm.HookedModel else "nnsight"
        )
        made.append(name_heads(model, pixels, words, n_texts=2, top=2, batch_size=5))
    assert torch.equal(made[0].chosen, made[1].chosen)
    assert torch.equal(made[0].scores, made[1].scores)


def test_words_and_templates_ship_with_the_package(tmp_path: Path) -> None:
    general = vocabulary("general")
    assert len(general) > 500
    assert len(set(general.texts)) == len(general)
    assert general.texts[general.words.index("dog")] == "a photo of the animal dog"
    assert {"colour", "animal", "place"} <= set(general.groups)
    assert set(attribute_templates()) - {"any"} <= set(general.groups)
    assert all("{}" in t for texts in attribute_templates().values() for t in texts)
    assert set(vocabulary("world").of(["colour"]).groups) == {"colour"}
    own = tmp_path / "own.txt"
    own.write_text("# mine\n[colour]\nsomething red\nsomething blue\n\n[shape]\na circle\n")
    assert vocabulary(own).groups == ("colour", "colour", "shape")
    with pytest.raises(mm.InputError, match="no vocabulary"):
        vocabulary(tmp_path / "missing.txt")
    with pytest.raises(mm.InputError, match="at least two texts"):
        vocabulary(["one"])


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    _, pixels = seen()
    found = name_heads(clip(), pixels[:20], vocabulary("world"), n_texts=2)
    back = HeadNames.load(found.save(tmp_path / "names.safetensors"))
    assert back.names(3, 1) == found.names(3, 1)
    assert back.top_files == found.top_files
