"""The loop over cases and parts, on pictures that say what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from methods_multimodal.cross_attention import Case, Effects, Part
from methods_multimodal.cross_attention._measuring import DrawParts, measure_parts
from mm_adapters import InputError, TokenLayout, load

PROMPTS = ("a red circle on a gray background", "a blue square on a white background", "red")
PARTS = [Part((layer,), None, (step,)) for layer in range(3) for step in range(2)] + [Part(heads=(1, 2))]


@cache
def drawing_model() -> Any:
    return load("tiny-sd")


@pytest.fixture(scope="module")
def layouts() -> list[TokenLayout]:
    return [drawing_model().prompt_layout("text", [prompt]) for prompt in PROMPTS]


def level(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0]


def pictures(values: Sequence[float]) -> Tensor:
    """A picture of each number."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2)


def measured(layouts: list[TokenLayout], batch: int) -> tuple[Effects, list[tuple[int, str | None, int]]]:
    """Base 10 i, goal 10 i + 1, control 10 i + 2 and part p 100 i + p, by case i; and what was asked."""
    asked = []

    def drawing_of(i: int, other: str | None, rng: torch.Generator) -> DrawParts:
        asked.append((i, other, int(torch.randint(2**31, (), generator=rng))))
        return lambda chunk: pictures([10 * i, 10 * i + 1, 10 * i + 2, *(100.0 * i + p for p in chunk)])

    cases = [Case(PROMPTS[0], "red"), Case(PROMPTS[1], "square"), Case(PROMPTS[2], "red")]
    return measure_parts(
        drawing_model(), cases, layouts, PARTS, level, drawing_of, what="x", batch=batch, seed=5
    ), asked


@pytest.mark.parametrize("batch", [4, 5, 6, 10, 99])
def test_every_part_of_every_case_is_in_its_cell_whatever_the_batch(layouts, batch: int) -> None:
    effects, asked = measured(layouts, batch)
    for i in range(3):
        assert (effects.base[i], effects.goal[i], effects.control[i]) == (10 * i, 10 * i + 1, 10 * i + 2)
        assert effects.changed[:, i].tolist() == [100 * i + p for p in range(len(PARTS))]
    assert effects.parts == tuple(PARTS)
    assert (effects.what, effects.metric) == ("x", "level")
    assert asked == measured(layouts, 99)[1]


def test_the_other_word_is_one_of_the_prompt_drawn_by_the_seed_in_the_order_of_cases(layouts) -> None:
    _, asked = measured(layouts, 8)
    rng = torch.Generator().manual_seed(5)
    for i, word in enumerate(("red", "square", "red")):
        others = [w for w in PROMPTS[i].split() if w != word]
        # "a" stands twice in a prompt, and both are offered.
        wanted = others[int(torch.randint(max(1, len(others)), (), generator=rng))] if others else None
        assert asked[i][:2] == (i, wanted)
        torch.randint(2**31, (), generator=rng)


def test_nothing_to_trace_and_a_batch_without_a_part_are_refused(layouts) -> None:
    def never(i: int, other: str | None, rng: torch.Generator) -> DrawParts:
        raise AssertionError("nothing may be drawn")

    case = [Case(PROMPTS[0], "red")]
    with pytest.raises(InputError, match="nothing to trace"):
        measure_parts(drawing_model(), [], layouts, PARTS, level, never, what="x", batch=8, seed=0)
    with pytest.raises(InputError, match="nothing to trace"):
        measure_parts(drawing_model(), case, layouts, [], level, never, what="x", batch=8, seed=0)
    with pytest.raises(InputError, match="batch=3"):
        measure_parts(drawing_model(), case, layouts, PARTS, level, never, what="x", batch=3, seed=0)
