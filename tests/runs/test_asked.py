"""What is asked of a run is done whole, or refused by name before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from tests.runs.watched import ENGINES, calls_of, edited_by_hook, never_called

# A family, a site whose module is the block itself, and where that block is.
SITES = {
    "clip": ("vision.blocks.1.hook_resid_post", "vision_model.encoder.layers.1"),
    "llava": ("language.blocks.1.hook_resid_post", "model.language_model.layers.1"),
    "qwen2_vl": ("language.blocks.0.hook_resid_post", "model.language_model.layers.0"),
    "stable_diffusion": (
        "denoiser.blocks.1.hook_resid_post",
        "unet.mid_block.attentions.0.transformer_blocks.0",
    ),
}


@cache
def models_of(name: str) -> tuple[tiny.Case, dict[str, Any]]:
    """A family's case, and the model of each engine; built once, for every run leaves them as they were."""
    case = tiny.CASES[name]()
    return case, {engine: mm.wrap(case.model, engine=engine) for engine in ENGINES}


@pytest.fixture(params=[(name, engine) for name in SITES for engine in ENGINES], ids="-".join)
def asked(request: pytest.FixtureRequest) -> tuple[Any, tiny.Case, str, Any]:
    """A model, its case, the site, and the site's module."""
    name, engine = request.param
    case, models = models_of(name)
    site, path = SITES[name]
    return models[engine], case, site, attrgetter(path)(case.model)


def as_generator(numbers: list[int]) -> Iterator[int]:
    return (n for n in numbers)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array, as_generator, frozenset])
def test_rows_of_every_kind_are_those_rows_with_their_axis(
    asked: Any, kind: Callable[[list[int]], Any]
) -> None:
    model, case, site, module = asked
    whole = torch.stack(calls_of(module, case))
    read = mm.Read(site, rows=kind([1]))
    for _ in range(2):  # A generator is not used up by the first run.
        value = model.run(case.inputs, read=[read])[site]
        right = whole[:, 1:2] if value.ndim == whole.ndim else whole[0, 1:2]
        torch.testing.assert_close(value, right, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [[-1], slice(-1, None), slice(1, 2), -1])
def test_negative_rows_count_from_the_last(asked: Any, rows: Any) -> None:
    model, case, site, module = asked
    n = calls_of(module, case)[0].shape[0]
    rows = slice(n - 1, n) if rows == slice(1, 2) else rows
    run = model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, rows=rows)])

    def zero_last(value: Tensor) -> Tensor:
        return torch.cat([value[:-1], torch.zeros_like(value[-1:])])

    right = edited_by_hook(module, case, zero_last)
    torch.testing.assert_close(case.head(run.output), right, rtol=0, atol=0)
    assert run.receipts[0].moved == 1.0


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([0, 99], "99"),
        ([-99], "-99"),
        (slice(99, None), "99"),
        (slice(2, 2), "2:2"),
        (slice(0, 99), "0:99"),
        ([], "empty"),
        ([0.0], r"0\.0"),
        ([True], "True"),
        (torch.tensor([0.5]), r"0\.5"),
        ("all rows", "all rows"),
        ("uncond?", "uncond?"),
    ],
)
def test_rows_that_are_not_all_there_are_refused_before_anything_runs(
    asked: Any, rows: Any, named: str
) -> None:
    model, case, site, _ = asked
    with never_called(case.model), pytest.raises(mm.InputError, match=named):
        model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, rows=rows)])
    with never_called(case.model), pytest.raises(mm.InputError, match=named):
        model.run(case.inputs, read=[mm.Read(site, rows=rows)])


@pytest.mark.parametrize("kind", [list, torch.tensor, as_generator])
def test_positions_are_those_positions_and_negative_ones_count_from_the_end(kind: Any, asked: Any) -> None:
    model, case, site, module = asked
    run = model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, positions=kind([2, -1]))])

    def zero(value: Tensor) -> Tensor:
        new = value.clone()
        new[:, [2, -1]] = 0
        return new

    torch.testing.assert_close(case.head(run.output), edited_by_hook(module, case, zero), rtol=0, atol=0)


@pytest.mark.parametrize(("positions", "named"), [([3, 5000], "5000"), ([1.5], r"1\.5"), ([], "empty")])
def test_positions_that_are_not_all_there_are_refused(asked: Any, positions: Any, named: str) -> None:
    model, case, site, _ = asked
    with pytest.raises(mm.InputError, match=named):
        model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, positions=positions)])
    assert case.head(model.run(case.inputs).output).isfinite().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_positions_of_a_pattern_are_refused_for_it_has_two_such_axes(engine: Any) -> None:
    model = mm.wrap(tiny.clip().model, engine=engine)
    edit = mm.Edit("vision.blocks.0.attn.hook_pattern", torch.zeros_like, positions=[0])
    with pytest.raises(mm.InputError, match="query, key"):
        model.run(tiny.clip().inputs, edit=[edit])


@pytest.mark.parametrize("steps", [[7], [0, 7], range(9)])
def test_a_step_that_there_is_none_of_is_named(asked: Any, steps: Any) -> None:
    model, case, site, _ = asked
    named = "8" if isinstance(steps, range) else "7"
    read = mm.Read(site, steps=steps)
    with never_called(case.model), pytest.raises((mm.InputError, mm.ReadNeverFiredError), match=named):
        model.run(case.inputs, read=[read])


@pytest.mark.parametrize("bad", [[-1], [0.5], [], "first", [None]])
def test_steps_and_calls_that_mean_nothing_are_refused_where_they_are_written(bad: Any) -> None:
    with pytest.raises(mm.InputError):
        mm.Read("denoiser.hook_out", steps=bad)
    with pytest.raises(mm.InputError):
        mm.Edit("denoiser.hook_out", torch.zeros_like, calls=bad)


def halved_in_place(value: Tensor) -> Tensor:
    value.mul_(0.5)
    return value


def test_an_edit_in_place_has_its_receipt_and_does_what_a_copy_would(asked: Any) -> None:
    model, case, site, module = asked
    read = model.run(case.inputs, read=[site], edit=[mm.Edit(site, halved_in_place)])
    assert read.receipts[0].moved == pytest.approx(0.5)
    right = edited_by_hook(module, case, lambda value: value * 0.5)
    torch.testing.assert_close(case.head(read.output), right, rtol=0, atol=0)


def test_a_reduce_in_place_does_not_edit_the_model(asked: Any) -> None:
    model, case, site, _ = asked
    run = model.run(case.inputs, read=[mm.Read(site, reduce=lambda v: v.mul_(0).sum(-1))])
    torch.testing.assert_close(
        case.head(run.output), case.head(model.run(case.inputs).output), rtol=0, atol=0
    )
    assert float(run[site].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("fn", "named"),
    [
        (lambda v: v[:1, :1], "same shape"),
        (lambda v: v * 1j, "complex"),
        (lambda v: v * float("nan"), "NaN"),
        (lambda v: None, "NoneType"),
        (lambda v: 0.0, "float"),
    ],
)
def test_what_an_edit_may_not_return(asked: Any, fn: Any, named: str) -> None:
    model, case, site, _ = asked
    with pytest.raises(mm.InputError, match=named):
        model.run(case.inputs, edit=[mm.Edit(site, fn)])


def test_scores_may_be_masked_with_infinity() -> None:
    case = tiny.clip()
    model = mm.wrap(case.model)

    def mask(scores: Tensor) -> Tensor:
        return scores.index_fill(-1, torch.tensor([0]), -torch.inf)

    run = model.run(
        case.inputs,
        edit=[mm.Edit("vision.blocks.0.attn.hook_attn_scores", mask)],
        read=["vision.blocks.0.attn.hook_pattern"],
    )
    assert float(run["vision.blocks.0.attn.hook_pattern"][..., 0].abs().max()) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "given",
    [
        {"edit": mm.Edit("vision.hook_embed", torch.zeros_like)},
        {"read": "vision.hook_embed"},
        {"read": mm.Read("vision.hook_embed")},
        {"read": [3]},
        {"edit": ["vision.hook_embed"]},
    ],
)
def test_what_is_no_list_of_reads_or_edits_is_refused(engine: Any, given: dict[str, Any]) -> None:
    case = tiny.clip()
    with never_called(case.model), pytest.raises(mm.InputError, match=r"read|edit"):
        mm.wrap(case.model, engine=engine).run(case.inputs, **given)


@pytest.mark.parametrize("what", [{"fn": None}, {"fn": "zero"}])
def test_an_edit_is_a_function(what: dict[str, Any]) -> None:
    with pytest.raises(mm.InputError, match="function"):
        mm.Edit("vision.hook_embed", **what)


def test_a_hook_of_another_shape_is_refused_and_none_is_not() -> None:
    case = tiny.stable_diffusion()
    model, site = mm.wrap(case.model), "denoiser.blocks.1.cross_attn.hook_z"
    with pytest.raises(mm.InputError, match="same shape"):
        model.run_with_hooks(**case.inputs, fwd_hooks=[(site, lambda z, hook: z.mean(0, True))])
    model.run_with_hooks(**case.inputs, fwd_hooks=[(site, lambda z, hook: None)])


def test_a_block_that_sets_another_shape_is_refused() -> None:
    case = tiny.stable_diffusion()
    model, site = mm.wrap(case.model, engine="nnsight"), "denoiser.blocks.1.cross_attn.hook_z"

    def traced() -> None:
        with model.generate(**case.inputs):
            model.site(site, model.site(site).mean(0, True))

    with pytest.raises(mm.InputError, match="was set to"):
        traced()


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_an_autoencoder_that_takes_them_one_by_one_are_refused(engine: Any) -> None:
    case = tiny.CASES["stable_diffusion"]()
    model, site = mm.wrap(case.model, engine=engine), "vae.resnets.0.hook_out"
    right = model.run(case.inputs, read=[site])[site]
    case.model.vae.enable_slicing()
    torch.testing.assert_close(model.run(case.inputs, read=[site])[site], right, rtol=1e-4, atol=1e-4)
    with pytest.raises(mm.ModelStateError, match="disable_slicing"):
        model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, rows=[0])])
