"""Each kind of value has a fingerprint of its content: equal for a copy, another for one thing changed."""

from __future__ import annotations

import functools
import io
import math
import operator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mm_adapters import InputError
from mm_adapters.storage.fingerprint import _elsewhere, of_module, of_tensors, of_value


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0


@dataclass(frozen=True)
class Place:
    x: int
    y: int = 0


def scaled(value: float, by: float = 2.0) -> float:
    return value * by


@functools.lru_cache
def remembered(value: float) -> float:
    return value + 1


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adds(n: int) -> Any:
    return lambda value: value + n


def layer(value: float) -> nn.Module:
    module = nn.Linear(2, 2, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def model(value: float, context: int = 4) -> Any:
    preparer = Preparer(context=context)
    return SimpleNamespace(wrapped=layer(value), preparer=preparer)


@dataclass
class Preparer:
    context: int
    tokenizer: Any = None
    image_processor: Any = None


class Called:
    def __call__(self) -> None: ...


# Of each kind: two that are the same, and others that are not.
KINDS: dict[str, tuple[Any, Any, list[Any]]] = {
    "set": ({3, 1, 2}, {1, 2, 3}, [{1, 2}, {1, 2, 4}]),
    "frozen set": (frozenset("ab"), frozenset("ba"), [frozenset("a")]),
    "generator": (seeded(1), seeded(1), [seeded(2)]),
    "dtype": (torch.float32, torch.float32, [torch.float16, torch.device("cpu"), "float32"]),
    "device": (torch.device("cpu"), torch.device("cpu"), [torch.device("meta"), "cpu"]),
    "class": (Point, Point, [Place, Point(0), nn.Linear]),
    "record": (Point(1, 2), Point(1, 2), [Point(2, 1), Place(1, 2), {"x": 1, "y": 2}]),
    "function made in C": (math.sin, math.sin, [math.cos, operator.add]),
    "torch's function": (torch.relu, torch.relu, [torch.sigmoid]),
    "function": (adds(1), adds(1), [adds(2), scaled]),
    "wrapped function": (remembered, remembered.__wrapped__, [scaled]),
    "partial": (
        partial(scaled, by=3.0),
        partial(scaled, by=3.0),
        [partial(scaled, by=4.0), partial(scaled, 3.0), partial(remembered.__wrapped__, by=3.0), scaled],
    ),
    "module": (layer(1.0), layer(1.0), [layer(2.0), nn.Identity()]),
    "model": (model(1.0), model(1.0), [model(2.0), model(1.0, context=5), layer(1.0)]),
    "complex number": (1j, 1j, [2j, 1.0]),
    "range": (range(3), [0, 1, 2], [range(4)]),
    "tensor without data": (
        torch.zeros(2, device="meta"),
        torch.zeros(2, device="meta"),
        [torch.zeros(3, device="meta"), torch.zeros(2)],
    ),
    "tensor": (
        torch.ones(2),
        torch.ones(2),
        [torch.ones(2).half(), torch.ones(1, 2), torch.tensor([1.0, 2])],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_known_by_its_content(kind: str) -> None:
    one, same, others = KINDS[kind]
    assert of_value(one) == of_value(same)
    texts = [of_value(other) for other in others]
    assert len({of_value(one), *texts}) == 1 + len(others)


def test_kinds_are_told_apart() -> None:
    assert len({of_value(one) for one, _, _ in KINDS.values()}) == len(KINDS)


def test_what_has_no_content_is_refused_by_its_class() -> None:
    halves = SimpleNamespace(wrapped=layer(1.0)), SimpleNamespace(preparer=Preparer(1))
    for wrong in (object(), io.StringIO("a"), iter([1]), Called(), *halves):
        with pytest.raises(InputError, match=f"and a {type(wrong).__name__} has no content that can be told"):
            of_value(wrong)


def test_a_file_that_cannot_be_read_is_known_by_why(tmp_path: Path) -> None:
    gone, other = tmp_path / "gone.png", tmp_path / "other.png"
    assert of_value(gone) == of_value(other)
    assert of_value(gone) != of_value(tmp_path)  # It is a folder.
    other.write_bytes(b"x")
    assert of_value(gone) != of_value(other)


def test_tensors_without_data_are_known_by_shape_and_name() -> None:
    def text(name: str = "a", **options: Any) -> str:
        return of_tensors({name: torch.zeros(options.pop("n", 2), device="meta", **options)})

    assert text() == text()
    assert (
        len({text(), text("b"), text(n=3), text(dtype=torch.float16), of_tensors({"a": torch.zeros(2)})}) == 5
    )
    assert text(n=0) != of_tensors({"a": torch.zeros(0)})


def test_the_scales_of_packed_weights_are_seen() -> None:
    """As bitsandbytes packs four bits: the weight has a state, and that the scales."""

    def packed(scale: Any) -> nn.Module:
        module = layer(1.0)
        module.weight.quant_state = SimpleNamespace(absmax=scale)  # type: ignore[attr-defined]
        return nn.Sequential(module)

    assert torch.equal(_elsewhere(packed(torch.ones(3))[0])["scales"], torch.ones(3))  # type: ignore[index]
    assert _elsewhere(packed(None)[0]) == {}  # type: ignore[index]
    texts = [
        of_module(packed(scale))["weights"] for scale in (torch.ones(3), torch.ones(3), torch.zeros(3), None)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
