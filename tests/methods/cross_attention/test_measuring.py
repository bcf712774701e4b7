"""The loop over cases and parts, on pictures that say what they are of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.cross_attention import Case, Effects, Part
from methods_multimodal.cross_attention._measuring import Drawing, check_work, measure_parts
from mm_adapters import InputError

PARTS = [Part((layer,), None, (step,)) for layer in range(3) for step in range(2)] + [Part(heads=(1, 2))]
N = len(PARTS)


@cache
def drawing_model() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


def level(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0]


def pictures(values: Sequence[float]) -> Tensor:
    """A picture of each number."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2)


def measured(batch: int, goal: float | None = None, whole: Sequence[bool] | None = None) -> Effects:
    """Base 10 i, goal 10 i + 1, part p 100 i + p and its control 1000 i + p, by case i; case 1 has none."""

    def drawing(i: int) -> Drawing:
        def draw(chunk: Sequence[int]) -> Tensor:
            controls = [1000.0 * i + p for p in chunk if i != 1]
            ends = [10.0 * i, 10.0 * i + 1 if goal is None else goal]
            return pictures([*ends, *(100.0 * i + p for p in chunk), *controls])

        return Drawing(draw, "" if i == 1 else f"control of {i}")

    cases = [Case("a", "a")] * 3
    drawings = [drawing(i) for i in range(3)]
    return measure_parts(drawing_model(), cases, PARTS, level, drawings, what="x", batch=batch, whole=whole)


@pytest.mark.parametrize("batch", [4, 5, 6, 10, 99])
def test_every_part_and_its_control_are_in_their_cells_whatever_the_batch(batch: int) -> None:
    effects = measured(batch)
    assert effects.base.tolist() == [0, 10, 20]
    assert effects.goal.tolist() == [1, 11, 21]
    for i in range(3):
        assert effects.changed[:, i].tolist() == [100 * i + p for p in range(N)]
    assert effects.control.tolist() == [[p, 2000 + p] for p in range(N)]
    assert effects.control_of == ("control of 0", "", "control of 2")
    assert effects.parts == tuple(PARTS)
    assert (effects.what, effects.metric) == ("x", "level")


def test_controls_are_compared_over_the_cases_that_have_one() -> None:
    effects = measured(99)
    # Cases 0 and 2: gaps 1 and 1, controls p - 0 and 2000 + p - 20.
    torch.testing.assert_close(effects.control_share().mean, torch.arange(N) + 990.0)
    torch.testing.assert_close(effects.control_shift().mean, torch.arange(N) + 990.0)
    # Changed less control: 0 in case 0, 200 - 2000 in case 2.
    torch.testing.assert_close(effects.above_control().mean, torch.full((N,), -900.0))
    alone = Effects(**{**vars(effects), "control": torch.zeros(N, 0), "control_of": ("", "", "")})
    assert alone.control_share().mean.isnan().all()


def test_only_what_is_everything_and_gives_the_goals_picture_is_true_by_construction() -> None:
    whole = [p == 3 for p in range(N)]
    # The pictures of part 3 are 3, 103 and 203; a goal of 3 is the first's alone.
    assert not any(measured(99, goal=3.0, whole=whole).by_construction)

    def draw(chunk: Sequence[int]) -> Tensor:
        return pictures([0.0, 3.0, *map(float, chunk), *map(float, chunk)])

    def effects(whole: Sequence[bool] | None) -> Effects:
        return measure_parts(
            drawing_model(),
            [Case("a", "a")],
            PARTS,
            level,
            [Drawing(draw, "x")],
            what="x",
            batch=9,
            whole=whole,
        )

    assert effects(whole).by_construction == tuple(whole)
    assert not any(effects([p == 2 for p in range(N)]).by_construction)
    assert not any(effects(None).by_construction)


def test_nothing_to_trace_and_a_batch_without_a_part_are_refused() -> None:
    case = [Case("a", "a")]
    with pytest.raises(InputError, match="nothing to trace"):
        check_work([], PARTS, 8)
    with pytest.raises(InputError, match="nothing to trace"):
        check_work(case, [], 8)
    with pytest.raises(InputError, match="batch=3"):
        check_work(case, PARTS, 3)
