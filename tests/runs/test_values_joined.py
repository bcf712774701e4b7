"""The values of a run's calls made one tensor, and the small rules beside it, against numbers by hand."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import nn

import mm_adapters as mm
from mm_adapters import InputError
from mm_adapters.records import resolve
from mm_adapters.records.spec import Guidance, Site
from mm_adapters.runs import turns
from mm_adapters.runs.clock import Clock
from mm_adapters.runs.foreseen import n_positions
from mm_adapters.runs.gradients import differentiable
from mm_adapters.runs.guided_rows import GuidedRows
from mm_adapters.runs.joining import Value, by_call, of_calls, of_generation, of_loop
from mm_adapters.runs.lens import Call
from mm_adapters.runs.session import Session


def site(part: str = "hook_resid_post", axes: tuple[str, ...] = ("batch", "pos", "d_model")) -> Site:
    return Site(f"language.blocks.0.{part}", "language", "blocks", 0, part, None, "", axes)


def value(tensor: Any, n_before: int = 0, call: tuple[int, int] = (0, 0), part: int = 0) -> Value:
    return Value(torch.as_tensor(tensor, dtype=torch.float32), Call(*call), part, n_before)


# --- calls of a module, beside each other -------------------------------------------------------


def test_the_rows_of_all_calls_follow_each_other() -> None:
    a, b = value([[1.0, 2]]), value([[3.0, 4], [5, 6]])
    assert of_calls(site(), [a, b]).tolist() == [[1, 2], [3, 4], [5, 6]]
    packed = of_calls(site(), [value([[[1.0], [2]]]), value([[[3.0]]])], packed=True)
    assert packed.tolist() == [[[1], [2], [3]]]


@pytest.mark.parametrize(
    ("first", "second", "packed"),
    [((1, 2), (1, 3), False), ((1, 2, 3), (2, 2, 3), True), ((1, 2), (2, 2, 1), False)],
)
def test_calls_that_differ_in_more_than_rows_are_an_error(first: Any, second: Any, packed: bool) -> None:
    shapes = re.escape(f"{list(first)} and {list(second)}")
    with pytest.raises(
        InputError, match=f"blocks.0.hook_resid_post was called 2 times, with {shapes}, which"
    ):
        of_calls(site(), [value(torch.zeros(first)), value(torch.zeros(second))], packed=packed)


def test_the_parts_of_one_evaluation_are_rows_of_one_call() -> None:
    values = [
        value([[1.0]], call=(0, 0), part=0),
        value([[2.0]], call=(0, 0), part=1),
        value([[3.0]], call=(1, 0), part=0),
        value([[4.0]], call=(1, 0), part=1),
    ]
    joined, calls = of_loop(site(), values)
    assert joined.tolist() == [[[1], [2]], [[3], [4]]]
    assert calls == (Call(0, 0), Call(1, 0))
    with pytest.raises(InputError, match=r"the calls of one step have \[1, 1\] and \[1, 2\]"):
        of_loop(site(), [values[0], value([[1.0, 2]], part=1)])
    with pytest.raises(InputError, match=r"the shapes \[2, 1\] and \[1, 1\] at different calls"):
        of_loop(site(), values[:3])


# --- calls of a generation, along the sequence --------------------------------------------------


def test_one_call_of_a_generation_is_as_it_is_whatever_its_axes() -> None:
    alone = value([[1.0, 2]])
    assert of_generation(site(axes=("batch", "d_model")), [alone]) is alone.tensor


def test_later_calls_go_on_behind_or_replace_what_they_computed_again() -> None:
    first = value([[[1.0], [2], [3]]])
    assert of_generation(site(), [first, value([[[4.0]]], 3)]).flatten().tolist() == [1, 2, 3, 4]
    assert of_generation(site(), [first, value([[[9.0], [8]]], 2)]).flatten().tolist() == [1, 2, 9, 8]
    assert of_generation(site(), [first, value([[[7.0]]], 0)]).flatten().tolist() == [7]


def test_a_site_without_positions_does_not_join_along_a_generation() -> None:
    pooled = site("hook_pooled", ("batch", "d_model"))
    says = r"hook_pooled has no axis of positions, \[batch, d_model\], along which"
    with pytest.raises(InputError, match=says):
        of_generation(pooled, [value([[1.0]]), value([[2.0]], 1)])


@pytest.mark.parametrize(
    ("part", "fill"), [("attn.hook_pattern", 0.0), ("attn.hook_attn_scores", -torch.inf)]
)
def test_patterns_of_a_generation_are_filled_up_to_the_last_key(part: str, fill: float) -> None:
    pattern = site(part, ("batch", "head", "query", "key"))
    first, then = value([[[[1.0, 2], [3, 4]]]]), value([[[[5.0, 6, 7]]]], 2)
    joined = of_generation(pattern, [first, then])
    assert joined.tolist() == [[[[1, 2, fill], [3, 4, fill], [5, 6, 7]]]]
    says = f"{part}: this cache holds other keys at each call, so its patterns do not join"
    with pytest.raises(InputError, match=says):
        of_generation(pattern, [first, value([[[[5.0, 6]]]], 2)])  # One key was dropped.


def test_what_is_reduced_has_one_shape_at_each_call() -> None:
    assert by_call(site(), [value([1.0, 2]), value([3.0, 4])]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(InputError, match=r"the reduce gave \[2\] and \[1\] at the calls of this generation"):
        by_call(site(), [value([1.0, 2]), value([3.0])])


# --- a session's own rules ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> tuple[tiny.Case, mm.HookedModel]:
    case = tiny.clip_text()
    return case, mm.HookedModel(case.model)


EMBED, POST = "text.hook_embed", "text.blocks.0.hook_resid_post"


def test_a_site_is_read_once_in_a_run(clip: Any) -> None:
    case, model = clip
    with pytest.raises(InputError, match=f"^{POST}: read twice in one run; values are by site"):
        model.run(case.inputs, read=[POST, EMBED, mm.Read(POST, rows=[0])])
    assert set(model.run(case.inputs, read=[POST, EMBED]).values) == {POST, EMBED}


@pytest.mark.parametrize("answer", [None, 3, "x", [torch.zeros(1)]])
def test_a_reduce_gives_a_tensor(clip: Any, answer: Any) -> None:
    case, model = clip
    says = f"The reduce of {POST} returned a {type(answer).__name__}. It returns a tensor"
    with pytest.raises(InputError, match=says):
        model.run(case.inputs, read=[mm.Read(POST, lambda x: answer)])
    whole, mean = model.run(case.inputs, read=[POST])[POST], lambda x: x.mean(1)
    assert torch.equal(model.run(case.inputs, read=[mm.Read(POST, mean)])[POST], whole.mean(1))


def test_weights_made_in_inference_mode_have_no_gradients(clip: Any) -> None:
    with torch.inference_mode():
        weight = torch.ones(2)
    says = r"made under torch.inference_mode\(\), and autograd follows none"
    with pytest.raises(InputError, match=says), differentiable({}, weight):
        pass
    x = torch.arange(2.0)
    with torch.no_grad(), differentiable({"x": x, "n": 3}, torch.ones(2)) as followed:
        assert torch.is_grad_enabled()
        assert torch.equal(followed["x"], x)
        assert followed["n"] == 3


def test_embed_takes_texts_or_images() -> None:
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    for given in ({}, {"text": ["a"], "images": [torch.zeros(3, 2, 2)]}):
        with pytest.raises(InputError, match=r"^embed takes text or images, one of the two"):
            model.embed(**given)


def test_arguments_by_position_are_no_more_than_the_call_has(clip: Any) -> None:
    _, model = clip
    names = model.call_names().own
    assert model._by_name(tuple(range(len(names))), {}) == {n: i for i, n in enumerate(names)}
    says = f"^{len(names) + 1} arguments were given by position; there are {names[0]}, {names[1]}"
    with pytest.raises(InputError, match=says):
        model._by_name(tuple(range(len(names) + 1)), {})
    with pytest.raises(InputError, match=f"{names[0]} was given twice"):
        model._by_name((1,), {names[0]: 1})


def test_weights_converted_through_the_wrapper_are_the_models_own() -> None:
    case = tiny.clip_text()
    model = mm.HookedModel(case.model)
    assert model.text.cfg.dtype == torch.float32
    model.double()
    assert {p.dtype for p in case.model.parameters()} == {torch.float64}
    assert model.text.cfg.dtype == torch.float64


def test_positions_beyond_a_texts_tokens_are_foreseen(clip: Any) -> None:
    case, model = clip
    read, ids = model.sitemap[POST], case.inputs["input_ids"]  # Five tokens a row.
    foreseen = lambda *bounds, **more: n_positions(model, read, {"input_ids": ids, **more}, *bounds)  # noqa: E731
    assert [foreseen(4, 0), foreseen(4, -5), foreseen(0, 0)] == [None, None, None]  # They are there.
    assert [foreseen(5, 0), foreseen(0, -6), foreseen(9, -9)] == [5, 5, 5]
    assert foreseen(5, 0, past_key_values=object()) is None
    assert n_positions(model, read, {}, 5, 0) is None
    pooled = replace(read, axes=("batch", "d_model"))
    assert n_positions(model, pooled, {"input_ids": ids}, 5, 0) is None


@pytest.mark.parametrize(
    ("guidance", "guided", "want"),
    [
        (None, True, 1),
        (Guidance(), True, 1),  # Its parts are rows of one call.
        (Guidance(denoiser_calls=("cond", "uncond")), True, 2),
        (Guidance(denoiser_calls=("cond", "image", "uncond")), True, 3),
        (Guidance(denoiser_calls=("cond", "uncond")), False, 1),
    ],
)
def test_guidance_calls_a_denoiser_once_for_each_part(guidance: Any, guided: bool, want: int) -> None:
    session = Session.__new__(Session)
    session.sites = SimpleNamespace(loops={} if guidance is None else {"denoiser": guidance})  # type: ignore[assignment]
    session._guided = lambda asked: asked is guidance and guided  # type: ignore[method-assign]
    assert session.calls_a_turn("denoiser") == want
    assert session.calls_a_turn("text") == 1


# --- records ------------------------------------------------------------------------------------


def test_a_number_of_heads_is_where_the_family_says() -> None:
    block = nn.Module()
    block.attention = nn.Module()
    block.attention.config = SimpleNamespace(n=6)
    block.n_heads = 4
    assert resolve.head_count(block, "attention:config.n") == 6
    assert resolve.head_count(block, "gone:n|attention:none|:n_heads") == 4
    with pytest.raises(AttributeError, match=r"^Module has no gone:n\|attention:none, which its family says"):
        resolve.head_count(block, "gone:n|attention:none")


def test_a_tensor_is_told_from_what_is_none() -> None:
    layer = nn.Linear(2, 2, bias=False)
    assert resolve._tensor(layer, "weight")
    assert not resolve._tensor(layer, "bias")
    assert not resolve._tensor(layer, "in_features")
    assert not resolve._tensor(layer, "weight.gone")


# --- rows under guidance ------------------------------------------------------------------------


class Sites(dict):
    loops: ClassVar[dict[str, Any]] = {}


def guided(tower: str, turn: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], Any]:
    clock = Clock()
    clock.moved_to(turn, 0, 0)
    sites: Any = Sites({"s": SimpleNamespace(tower=tower)})
    rows = GuidedRows(object(), sites, {tower: clock}, lambda guidance: True)
    monkeypatch.setattr(rows, "_guidance", lambda name: Guidance())
    return lambda which, n: rows.of("s", which, n)


def test_outside_the_loop_only_texts_are_encoded_for_the_unconditional_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vision = guided("vision", 0, monkeypatch)
    assert (vision("cond", 2), vision("uncond", 2), vision("all", 2)) == (slice(None), None, slice(None))
    assert vision([1, -1], 3) == [1, 2]
    for turn, cond, uncond in ((0, slice(None), None), (1, None, slice(None)), (2, None, None)):
        text = guided("text_2", turn, monkeypatch)
        assert (text("cond", 2), text("uncond", 2)) == (cond, uncond)


# --- turns of threads ---------------------------------------------------------------------------


def test_in_a_forked_child_other_threads_have_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs, free = nn.Module(), nn.Module(), nn.Module()
    table = turns._Table()
    monkeypatch.setattr(turns, "_TABLE", table)
    for module, thread in ((mine, threading.get_ident()), (theirs, -5), (free, None)):
        turn = turns._turn_of(module)
        turn.thread, turn.depth = thread, 0 if thread is None else 2
        turn.watchers, turn.outer = ["w"], ["o"]  # type: ignore[list-item]
    table.waiting = {-5: []}
    before = table.changed
    table.forget_threads()
    kept = [(t.thread, t.depth, t.watchers, t.outer) for t in map(turns._turn_of, (mine, theirs, free))]
    assert kept == [
        (threading.get_ident(), 2, ["w"], ["o"]),
        (None, 0, [], []),
        (None, 0, [], []),
    ]
    assert table.waiting == {}
    assert table.changed is not before
