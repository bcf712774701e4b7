"""Dissection's bounds: what does not fit together, and units whose strongest pictures come late."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unchecked import unchecked

import mm_adapters as mm
from methods_multimodal.dissection import (
    Concepts,
    Units,
    collect,
    falcon,
    multimodal_neurons,
    selectivity,
)
from methods_multimodal.dissection.naming import JUDGE, Stream, _stronger
from methods_multimodal.dissection.survey import Survey, survey
from mm_adapters import InputError, MissingSiteError
from mm_adapters.store import Column, Store, Writer

# The package has a function of the same name.
surveying = importlib.import_module("methods_multimodal.dissection.survey")


@pytest.fixture(scope="module")
def clip() -> Any:
    return mm.load("tiny-clip", device="cpu")


def _store(folder: Path, n: int) -> tuple[Store, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    values = torch.randn(n, 3, generator=made)
    values[:, 1] = torch.linspace(-1, 1, n)  # The last are the strongest.
    values[:, 2] = torch.linspace(1, -1, n)  # The first are: none of those that come later joins.
    with Writer(folder, {"site": Column((3,)), JUDGE: Column((4,))}, {}) as writer:
        writer.append({"site": values, JUDGE: torch.ones(n, 4) / 2}, items=n)
    return Store(folder), values


def test_the_strongest_of_many_pictures_are_found_part_by_part(tmp_path: Path) -> None:
    store, values = _store(tmp_path / "store", 2500)
    found, where = Stream(store, "site", torch.ones(2, 4), False)._top(5)
    wanted = values.T.topk(5)
    assert torch.equal(found, wanted.values)
    assert torch.equal(where, wanted.indices)


def test_what_is_stronger_than_each_unit_s_bound() -> None:
    here = torch.tensor([[1.0, 9.0, 0.0], [5.0, 8.0, 0.0], [7.0, 9.5, 1.0], [6.0, 1.0, 0.0]])
    values, images = _stronger(here, torch.tensor([5.0, 9.0, 2.0]))
    none = float("-inf")
    assert values.tolist() == [[7, 6], [9.5, none], [none, none]]
    assert images[0].tolist() == [2, 3]
    assert int(images[1, 0]) == 2


def test_a_share_of_the_pictures_is_at_least_two(tmp_path: Path) -> None:
    stream = Stream(_store(tmp_path / "store", 300)[0], "site", torch.ones(2, 4), False)
    with pytest.raises(InputError, match=r"^The top 1% of 300 images are 1: too few\.$"):
        stream.rank_reorder(top_share=0.006)
    assert stream.rank_reorder(top_share=0.0067).shape == (3, 2)


def test_a_probe_has_pictures(clip: Any, tmp_path: Path) -> None:
    units = [Units(clip, "vision.blocks.0.hook_mlp_out")]
    with pytest.raises(InputError, match="There are no pictures to probe with"):
        collect(units, [], clip, tmp_path)


def test_a_survey_has_kernels_and_a_batch_to_check_with(
    clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = Units(clip, "vision.blocks.0.hook_mlp_out")
    concepts = Concepts(("red",), ("colour",))
    batch: Any = ({}, [])
    with pytest.raises(InputError, match=r"^No kernel pmi, iou; there is .*soft_wpmi"):
        survey(units, [batch, batch], clip, concepts, tmp_path, kernels=("cosine", "pmi", "iou"))
    for held_out, n in ((0.3, 1), (0.9, 2), (0.75, 2)):
        with pytest.raises(InputError, match="One batch names the units and another checks the names"):
            survey(units, [batch] * n, clip, concepts, tmp_path, held_out=held_out)
    asked: list[int] = []

    def stop(units: Any, batches: Any, *_: Any, **options: Any) -> None:
        asked.append(len(batches))
        raise StopIteration

    monkeypatch.setattr(surveying, "collect", stop)
    for held_out, n in ((0.3, 2), (0.3, 10), (0.0, 10), (0.5, 3)):
        with pytest.raises(StopIteration):
            survey(units, [batch] * n, clip, concepts, tmp_path, held_out=held_out)
    assert asked == [1, 7, 9, 1]  # The others check the names.


def test_a_survey_s_method_is_found_by_its_name() -> None:
    one, other = SimpleNamespace(method="network"), SimpleNamespace(method="cosine")
    holder: Any = SimpleNamespace(methods=(one, other))
    assert unchecked(Survey.by_name)(holder, "cosine") is other
    assert unchecked(Survey.by_name)(holder, "network") is one


class _Layouts(dict):
    def find(self, site: str) -> None:
        """None of these has the site."""


def test_a_site_without_patches_names_the_towers_that_have_some(clip: Any) -> None:
    units = Units(clip, "vision.blocks.0.hook_mlp_out")
    told = r"^The vision tower's layout has no 'patch' role, so the units of vision\.blocks\.0\.hook_mlp_out"
    with pytest.raises(MissingSiteError, match=told + r" have no maps\. Towers with a grid: none\.$"):
        units._layout({"text": ["a"]})
    fake: Any = SimpleNamespace(
        site="s",
        described=SimpleNamespace(tower="text"),
        model=SimpleNamespace(
            check_tower=lambda name: SimpleNamespace(name=name, role="text"), layout=_Layouts
        ),
    )
    told_of = (
        r"^The text tower's layout has no 'patch' role, .* of s have no maps\. Towers with a grid: vision\.$"
    )
    with pytest.raises(MissingSiteError, match=told_of):
        unchecked(Units._layout)(
            fake, {"text": SimpleNamespace(grid=None), "vision": SimpleNamespace(grid=(2, 2))}
        )
    picture = torch.zeros(1, 3, 64, 64)
    assert (
        units._layout({"text": ["a"], "pixel_values": picture}).grid
        == clip.layout(pixel_values=picture)["vision"].grid
    )


def test_numbers_that_do_not_fit_together_are_told() -> None:
    numbers = torch.rand(4, 3)
    assert selectivity(numbers, ["a", "b", "a", "b"]).preferred
    with pytest.raises(InputError, match=r"^4 inputs have 3 classes\.$"):
        selectivity(numbers, ["a", "b", "a"])
    with pytest.raises(InputError, match=r"all inputs are \['a'\]"):
        selectivity(numbers, ["a"] * 4)
    shown = torch.tensor([[True], [False], [True], [False]])
    with pytest.raises(InputError, match=r"^Pictures have 3 units and texts 2: they are not the same"):
        unchecked(multimodal_neurons)(numbers, shown, numbers[:, :2], shown, ["a"])
    assert multimodal_neurons(numbers, shown, numbers, shown, ["a"]).images.shape == (3, 1)


@pytest.mark.parametrize(
    ("images", "texts", "told"),
    [
        (3, 2, "4 images have 3 embeddings; 2 names have 2"),
        (4, 3, "4 images have 4 embeddings; 2 names have 3"),
        (4, 2, None),
    ],
)
def test_falcon_takes_an_embedding_for_each_picture_and_name(
    images: int, texts: int, told: str | None
) -> None:
    given: Any = (torch.rand(4, 3), torch.rand(images, 5), torch.rand(texts, 5), ["a", "b"])
    if told is None:
        assert unchecked(falcon)(*given) is not None
        return
    with pytest.raises(InputError, match=told):
        unchecked(falcon)(*given)
