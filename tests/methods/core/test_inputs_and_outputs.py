"""Batches of what a user holds, a model's output in its several forms, and what is written down."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor
from unchecked import unchecked

import mm_adapters as mm
from methods_multimodal.core.batches import batches
from methods_multimodal.core.embed import classifier, embed
from methods_multimodal.core.kept import Kept
from methods_multimodal.core.model import check_summary
from methods_multimodal.core.outputs import answer_ids, contrast_of, logit_scale
from methods_multimodal.core.progress import Progress, all_images, run_pass
from methods_multimodal.core.record import Record
from methods_multimodal.core.running import newest, recent, run_steps
from mm_adapters import CheckpointError, InputError, MissingSiteError, StoreError
from mm_adapters.store import save_tensors


@pytest.fixture(scope="module")
def clip() -> Any:
    return mm.load("tiny-clip", device="cpu")


def test_batches_hold_at_most_so_many_rows_in_order(clip: Any) -> None:
    vision, text = clip.towers["vision"], clip.towers["text"]
    pixels = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 2)

    def rows(items: Any, size: int) -> list[list[float]]:
        return [b["pixel_values"][:, 0, 0, 0].tolist() for b in batches(clip, vision, items, size)]

    assert rows(pixels, 2) == [[0, 1], [2, 3], [4]]
    assert rows(list(pixels), 2) == [[0, 1], [2, 3], [4]]
    assert rows(pixels, 1) == [[0], [1], [2], [3], [4]]
    assert rows(pixels[3], 2) == [[3]]
    assert rows({"pixel_values": pixels}, 3) == [[0, 1, 2], [3, 4]]
    (ids,) = batches(clip, text, "a red circle", 4)
    assert torch.equal(ids["input_ids"], clip.prepare(text=["a red circle"])["input_ids"])
    for bad in (0, -1):
        with pytest.raises(InputError, match=f"at least one row, not {bad}"):
            next(batches(clip, vision, pixels, bad))
    with pytest.raises(InputError, match=r"Images or texts were expected, and int was given"):
        next(batches(clip, vision, 3, 2))


def test_a_classifier_is_the_unit_mean_of_unit_vectors(clip: Any) -> None:
    templates = ("a photo of {}", "a drawing of the {}")
    rows = []
    for name in ("red", "circle", "blue"):
        each = [embed(clip, [t.format(name)], "text")[0] for t in templates]
        mean = sum((e / e.norm() for e in each), torch.zeros(())) / 2
        rows.append(mean / mean.norm())
    found = classifier(clip, ["red", "circle", "blue"], templates)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-4, atol=1e-6)
    plain = embed(clip, ["a photo of red"], "text")
    torch.testing.assert_close(classifier(clip, ["red"]), plain / plain.norm(), rtol=1e-4, atol=1e-6)


def test_a_summary_is_one_that_the_model_gives_out() -> None:
    pipe: Any = SimpleNamespace(kind="diffusion", name="a pipe")
    tower: Any = SimpleNamespace(name="text", mount=SimpleNamespace(unit=False))
    with pytest.raises(
        MissingSiteError, match=r"^a pipe: .* no summary of the text tower, .* a pipeline\. Load"
    ):
        unchecked(check_summary)(pipe, tower)
    dual: Any = SimpleNamespace(kind="contrastive", name="a clip")
    unchecked(check_summary)(dual, tower)
    tower.mount.unit = True
    with pytest.raises(MissingSiteError, match=r"^a clip: what runs the text tower divides its summary"):
        unchecked(check_summary)(dual, tower)


def test_every_form_of_a_contrastive_output_says_the_same() -> None:
    images, texts, scale = torch.randn(2, 4), torch.randn(3, 4), torch.tensor(7.0)
    logits = torch.tensor([[7 * float(i @ t) for t in texts] for i in images])
    forms: list[Any] = [
        (images, texts, scale),
        (images, texts, scale, None),  # A logit bias after it.
        {"image_features": images, "text_features": texts, "logit_scale": scale},
        SimpleNamespace(logits_per_image=logits, text_embeds=texts),
    ]
    for form in forms:
        found = contrast_of(form)
        torch.testing.assert_close(found.logits, logits, rtol=1e-5, atol=1e-5)
        assert found.texts is texts
    for one in ((None, texts, scale), (images, None, scale)):
        with pytest.raises(InputError, match="needs images and text; give both"):
            contrast_of(one)
    for alone in ({"logits_per_image": logits}, {"text_embeds": texts}, {}):
        with pytest.raises(InputError, match=r"^SimpleNamespace holds no image-text logits"):
            contrast_of(SimpleNamespace(**alone))
    with pytest.raises(InputError, match=r"^tuple holds no image-text logits"):
        contrast_of((images, texts))


def test_the_logit_scale_is_what_cosines_are_multiplied_with() -> None:
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    out = case.model(**case.inputs)
    cosines = out.image_embeds @ out.text_embeds.T
    torch.testing.assert_close(logit_scale(model) * cosines, out.logits_per_image, rtol=1e-5, atol=1e-5)
    tower = mm.HookedModel(tiny.clip_vision().model)
    with pytest.raises(InputError, match=f"^{tower.name} has no logit scale"):
        logit_scale(tower)


def test_an_answer_begins_after_its_prompt_where_it_repeats_that() -> None:
    def answer(*ids: int) -> list[int]:
        return answer_ids(torch.tensor(ids, dtype=torch.long), torch.tensor([5, 6])).tolist()

    assert answer(5, 6, 7, 8) == [7, 8]
    assert answer(5, 6) == []
    assert answer(5) == [5]
    assert answer(5, 7, 6) == [5, 7, 6]


def test_images_that_are_read_twice_are_a_folder_or_a_sequence(tmp_path: Path) -> None:
    for name in ("b", "a"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    assert [Path(p).name for p in all_images(tmp_path)] == ["a.png", "b.png"]
    assert [Path(p).name for p in all_images(str(tmp_path))] == ["a.png", "b.png"]
    assert all_images([1]) == [1]
    assert [int(row[0]) for row in all_images(torch.arange(3)[:, None])] == [0, 1, 2]
    with pytest.raises(InputError, match=r"There is no folder .*a\.png\.$"):
        all_images(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^There are no images\.$"):
        all_images([])
    with pytest.raises(InputError, match=r"^There are no images\.$"):
        all_images(torch.zeros(0, 3, 4, 4))
    with pytest.raises(InputError, match=r"and generator can be read once only. Pass a folder, or a list"):
        all_images(i for i in range(3))


def _add(state: dict[str, Tensor], images: list[Any], numbers: list[int]) -> dict[str, Tensor]:
    return {"sum": state["sum"] + sum(float(i) for i in images), "n": state["n"] + len(numbers)}


def test_a_pass_goes_on_with_its_own_work_only(tmp_path: Path) -> None:
    file = tmp_path / "pass.safetensors"
    start = {"sum": torch.zeros(()), "n": torch.zeros(())}
    items = [torch.tensor(float(i)) for i in range(5)]

    def go(settings: str, items: list[Tensor]) -> Progress:
        return run_pass(items, _add, start, settings=settings, file=file, batch_size=2)

    assert {k: float(v) for k, v in go("one", items).state.items()} == {"sum": 10, "n": 5}
    more = go("one", [*items, torch.tensor(7.0)])  # The first five are not summed again.
    assert {k: float(v) for k, v in more.state.items()} == {"sum": 17, "n": 6}
    told = rf"^{file} holds the progress of another run .*, or delete {tmp_path} to start afresh\.$"
    with pytest.raises(StoreError, match=told):
        go("two", items)


@dataclass(frozen=True)
class One(Record):
    value: Tensor
    names: tuple[str, ...]
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Other(Record):
    value: Tensor


def test_a_record_is_read_as_what_it_is_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    one = One(torch.arange(3.0), ("a", "b"), {"x": torch.ones(2), "y": torch.zeros(1)})
    one.save(path)
    back = One.load(path)
    assert (back.value.tolist(), back.names) == ([0, 1, 2], ("a", "b"))
    assert {k: v.tolist() for k, v in back.parts.items()} == {"x": [1, 1], "y": [0]}
    with pytest.raises(InputError, match=r"one\.safetensors holds One, not a Other\.$"):
        Other.load(path)
    save_tensors(path, {"value": torch.zeros(1)}, {})
    with pytest.raises(InputError, match=r"holds no record, not a Other\.$"):
        Other.load(path)
    bad = [
        ({"value": torch.zeros(1)}, {}, "KeyError: 'values'"),
        ({"value": torch.zeros(1)}, {"values": "{"}, "JSONDecodeError"),
        ({"value": torch.zeros(1)}, {"values": "[]"}, "AttributeError"),
        ({"value": torch.zeros(1)}, {"values": '{"extra": 1}'}, "TypeError"),
        ({"other": torch.zeros(1)}, {"values": "{}"}, "TypeError"),
        (
            {"value": torch.zeros(1)},
            {"values": json.dumps({"parts": {"keys": ["x"]}})},
            "KeyError: 'parts/x'",
        ),
    ]
    for tensors, facts, why in bad:
        save_tensors(path, tensors, {"record": "Other", **facts})
        with pytest.raises(CheckpointError, match=rf"is not the whole of a Other \({why}.*make it again\.$"):
            Other.load(path)


def test_kept_work_that_is_damaged_says_which_folder_to_delete(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> Other:
        made.append(1)
        return Other(torch.ones(2))

    work = Kept(tmp_path)
    assert work.record("part", Other, make).value.tolist() == [1, 1]
    assert work.record("part", Other, make).value.tolist() == [1, 1]
    assert len(made) == 1
    assert Kept(None).record("part", Other, make).value.tolist() == [1, 1]
    (tmp_path / "part.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match=f"part.safetensors.* Delete {tmp_path} to start afresh"):
        work.record("part", Other, make)
    save_tensors(tmp_path / "part.safetensors", {"value": torch.ones(1)}, {"record": "One"})
    with pytest.raises(StoreError, match=f"holds One, not a Other. Delete {tmp_path} to start afresh"):
        work.record("part", Other, make)


def test_a_run_goes_on_from_the_newest_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "sum.safetensors"
    asked: list[int] = []

    def step(state: Any, i: int) -> dict[str, Tensor]:
        asked.append(i)
        return {"sum": state["sum"] + i}

    start = {"sum": torch.zeros(())}
    save_tensors(file, {"sum": torch.tensor(1.0)}, {"next": "2"})
    save_tensors(recent(file), {"sum": torch.tensor(3.0)}, {"next": "3"})
    assert float(run_steps(5, step, start, file)["sum"]) == 10
    assert asked == [3, 4]
    assert not recent(file).exists()
    for facts in ({}, {"next": "five"}, {"next": "-1"}):
        save_tensors(file, {"sum": torch.tensor(1.0)}, facts)
        told = f"^{file} does not say how far it has come. Or delete {tmp_path} to start afresh"
        with pytest.raises(StoreError, match=told):
            run_steps(5, step, start, file)
    save_tensors(recent(file), {"sum": torch.tensor(6.0)}, {"next": "4"})
    assert float(run_steps(5, step, start, file)["sum"]) == 10
    assert newest(tmp_path / "none", lambda path: (0, path)) is None
