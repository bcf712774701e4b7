"""The rows of each invoke, the steps of a loop and a site's part of a raw value, against values by hand."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import numpy as np
import pytest
import tiny
import torch
from nnsight.intervention.interleaver import Event, OutOfOrderError
from torch import Tensor, nn

from mm_adapters import InputError, MissingSiteError
from mm_adapters.nnsight_engine import envoys, iteration, raw_values, recorder
from mm_adapters.nnsight_engine.batcher import Axis, RowBatcher
from mm_adapters.nnsight_engine.interleaver import END, SiteInterleaver
from mm_adapters.nnsight_engine.invokes import combine
from mm_adapters.nnsight_engine.recorder import Recorder
from mm_adapters.nnsight_engine.text_rows import Padding
from mm_adapters.records.spec import Input, Output, Site
from mm_adapters.runs.clock import Clock
from mm_adapters.traced import TracedModel


@dataclass
class Answer:
    """A model's output with entries, as diffusers'."""

    rows: Any
    note: Any = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class Entries(dict):
    """A mapping that copies itself, as transformers' outputs do."""

    def copy(self) -> Entries:
        return Entries(self)


def batcher(*, parts: int = 1, heads: int = 1, entry: tuple[str, ...] | None = None) -> RowBatcher:
    """Two invokes, of 1 and 2 pictures, at an output."""
    rows = SimpleNamespace(
        axis=lambda location: Axis("pictures", lambda: parts, heads),
        is_output=lambda location: True,
        entry=lambda key: entry,
    )
    made = RowBatcher(SimpleNamespace(rows=rows))
    made.invokes = [((), {}), ((), {})]
    made.sizes = [{"pictures": 1, "texts": 2}, {"pictures": 2, "texts": 1}]
    made.locate("model.output")
    return made


FIRST, SECOND = [0, 1], [1, 1]


# A tuple elsewhere is several values.
@pytest.mark.parametrize(
    ("kind", "name"),
    [(list, "images"), (np.array, "images"), *((k, "pooler_output") for k in (list, tuple, np.array))],
)
def test_an_entry_with_one_thing_a_picture_is_cut_and_put_back(kind: Any, name: str) -> None:
    made, value = batcher(), Entries({name: kind([10, 20, 30])})
    assert list(made.narrow(value, FIRST)[name]) == [10]
    assert list(made.narrow(value, SECOND)[name]) == [20, 30]
    new = made.widen(value, SECOND, Entries({name: kind([5, 6])}))
    assert type(new[name]) is type(value[name])
    assert list(new[name]) == [10, 5, 6]
    assert list(value[name]) == [10, 20, 30]  # It was not written into.


def test_an_entry_of_another_length_is_every_invokes() -> None:
    made, value = batcher(), Entries({"names": ["a", "b"]})
    assert made.narrow(value, SECOND)["names"] == ["a", "b"]
    assert made.widen(value, SECOND, Entries({"names": ["c"]}))["names"] == ["c"]


def test_records_are_cut_entry_by_entry_and_those_within_them() -> None:
    made = batcher()
    value = Answer(torch.arange(3.0), Entries({"inner": torch.arange(3.0) * 10}))
    narrowed = made.narrow(value, SECOND)
    assert narrowed.rows.tolist() == [1, 2]
    assert narrowed.note["inner"].tolist() == [10, 20]
    edited = Answer(narrowed.rows + 5, Entries({"inner": narrowed.note["inner"] + 1}))
    whole = made.widen(value, SECOND, edited)
    assert whole.rows.tolist() == [0, 6, 7]
    assert whole.note["inner"].tolist() == [0, 11, 21]
    assert made.narrow(Answer(torch.arange(3.0)), SECOND).note is None


def test_one_invoke_has_all_rows() -> None:
    made, value = batcher(), torch.arange(3.0)
    assert made.narrow(value, None) is value
    made.invokes = made.invokes[:1]
    assert made.narrow(value, SECOND) is value


@pytest.mark.parametrize(
    ("parts", "heads", "n", "first", "second"),
    [
        (1, 1, 3, [0], [1, 2]),
        (2, 1, 6, [0, 3], [1, 2, 4, 5]),  # Each part of the guidance has rows of every invoke.
        (2, 1, 3, [0], [1, 2]),  # Before guidance doubles the rows.
        (1, 2, 6, [0, 1], [2, 3, 4, 5]),  # Heads are folded into the rows.
        (1, 1, 1, [0], [0]),  # One for all.
    ],
)
def test_which_rows_are_an_invokes(parts: int, heads: int, n: int, first: Any, second: Any) -> None:
    value = torch.arange(float(n))[:, None] * torch.ones(1, 2)
    for group, rows in ((FIRST, first), (SECOND, second)):
        made = batcher(parts=parts, heads=heads)
        narrowed = made.narrow(value, group)
        assert narrowed[:, 0].tolist() == rows
        want = value.clone()
        want[rows] = -1.0
        assert torch.equal(made.widen(value, group, torch.full_like(narrowed, -1.0)), want)


def test_rows_that_are_nobodys_are_an_error() -> None:
    with pytest.raises(InputError, match=r"model.output has 4 rows; this run has 3 pictures\. Which rows"):
        batcher().narrow(torch.zeros(4, 2), FIRST)
    named = batcher(entry=("pictures", "texts"))
    value = Entries({"logits": torch.arange(9.0).view(3, 3)})
    assert named.narrow(value, SECOND)["logits"].tolist() == [[5], [8]]
    with pytest.raises(
        InputError, match=r"^model.output has 4 rows in an entry of 3 pictures: whose are they"
    ):
        named.narrow(Entries({"logits": torch.zeros(4, 3)}), SECOND)
    tokens = batcher(entry=("pictures",)).narrow(Entries({"x": torch.arange(6.0)}), SECOND)
    assert tokens["x"].tolist() == [2, 3, 4, 5]  # Two tokens of each picture.


def test_invokes_of_other_sizes_are_no_one_call() -> None:
    whole = combine([{"x": torch.zeros(1, 2)}, {"x": torch.ones(2, 2)}, {"y": 3}], Padding())
    assert whole["x"].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert whole["y"] == 3
    with pytest.raises(InputError, match=r"^x has the sizes \[\(2,\), \(3,\)\] in the invokes of one run"):
        combine([{"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 2)}], Padding())


# --- steps ----------------------------------------------------------------------------------------


def test_a_slice_of_steps_has_no_stride() -> None:
    steps = iteration.Steps()
    for stride in (2, -1, 0):
        with pytest.raises(InputError, match=r"takes no stride\. Give the steps: tracer.iter\[\[0, 2, 4\]\]"):
            steps[::stride]
    for key, must in ((slice(None), False), (slice(1, 3, 1), False), (2, True), ([0, 2], True), ((1,), True)):
        assert steps[key].must_exist(0) is must


class Mediator:
    """A block's, in a run of so many steps."""

    n_steps = 3

    def __init__(self) -> None:
        self.iteration: Any = 0

    @classmethod
    def value(cls, location: str) -> str | None:
        assert location == iteration.STEP
        cls.asked += 1
        return iteration.END if cls.asked >= cls.n_steps else None

    asked = 0


@pytest.fixture
def mediator(monkeypatch: pytest.MonkeyPatch) -> Mediator:
    made = Mediator()
    monkeypatch.setattr(Mediator, "asked", 0)
    monkeypatch.setattr(iteration, "Mediator", Mediator)
    monkeypatch.setattr(iteration, "current", lambda what: made)
    return made


def test_a_slice_ends_with_the_run_and_an_index_must_be_there(mediator: Mediator) -> None:
    steps = []
    for step in iteration.Steps()[:]:
        assert (mediator.iteration, mediator.__dict__["step"]) == (step, step)
        steps.append(step)
    assert steps == [0, 1, 2]
    assert (mediator.iteration, mediator.__dict__["step"]) == (0, None)  # As it was before.


def test_a_step_that_was_not_made_is_named(mediator: Mediator) -> None:
    with pytest.raises(IndexError, match=r"^Step 9 was asked for, and this run did not make it"):
        for _ in iteration.Steps()[[0, 1, 2, 9]]:
            pass
    assert mediator.iteration == 0


def test_steps_are_counted_from_zero(mediator: Mediator) -> None:
    with pytest.raises(InputError, match=r"^Steps are counted from 0; there is no step -1"):
        list(iteration.Steps()[[0, -1]])


# --- raw values, in a service's sandbox -----------------------------------------------------------------


def site(location: Any) -> Site:
    return Site("vision.blocks.0.x", "vision", "blocks", 0, "x", location, "layer", ("batch", "pos"))


Raw = namedtuple("Raw", ["note", "value"])


def test_an_output_is_its_first_tensor_or_the_item_that_is_named() -> None:
    x, y = torch.arange(6.0).view(1, 6), torch.ones(1, 6)
    assert raw_values.shown(site(Output("")), x, None) is x
    assert raw_values.shown(site(Output("")), (None, x, y), None) is x
    assert raw_values.shown(site(Output("", item=2)), (None, x, y), None) is y
    assert raw_values.shown(site(Output("", chunk=(3, 1))), x, None).tolist() == [[2, 3]]
    assert raw_values.shown(site(Output("")), x, 2).tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_what_is_written_into_a_part_is_in_the_raw_value() -> None:
    x = torch.arange(6.0).view(2, 3).T  # Not in one piece.
    raw_values.shown(site(Output("", chunk=(2, 1))), x, None)[:] = -1
    assert x.tolist() == [[0, -1], [1, -1], [2, -1]]
    assert x.is_contiguous()


def test_an_input_is_its_first_tensor_or_the_argument_that_is_named() -> None:
    x, y = torch.zeros(1, 2), torch.ones(1, 2)
    assert raw_values.shown(site(Input("")), ((x,), {"y": y}), None) is x
    assert raw_values.shown(site(Input("")), ((), {"y": y, "hidden_states": x}), None) is x
    assert raw_values.shown(site(Input("", argument="y")), ((x,), {"y": y}), None) is y
    assert raw_values.shown(site(Input("", argument="z")), ((x,), {"y": y}), None) is x


def test_what_a_sandbox_cannot_hand_over_is_refused() -> None:
    x = torch.zeros(1, 2)
    for name in ("past_key_values", "cache"):
        assert raw_values.shown(site(Input("")), ((x,), {name: None}), None) is x
        with pytest.raises(MissingSiteError, match=r"vision.blocks.0.x is read beside a key-value cache"):
            raw_values.shown(site(Input("")), ((x,), {name: object()}), None)
    with pytest.raises(MissingSiteError, match=r"vision.blocks.0.x is a branch times a parameter"):
        raw_values.shown(site(Output("", gain="gamma")), x, None)


class Served:
    """A site whose values come one by one; then the run is over."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values, self.at, self.written = values, -1, {}

    @property
    def output(self) -> Tensor:
        self.at += 1
        if self.at == len(self.values):
            raise OutOfOrderError("over")
        return self.values[self.at]

    @output.setter
    def output(self, new: Tensor) -> None:
        self.written[self.at] = new


@pytest.mark.parametrize(
    ("lengths", "n_before"),
    [
        ([3, 1, 1], [0, 3, 4]),  # A key-value cache: new positions alone.
        ([3, 4, 5], [0, 0, 0]),  # Without one each call computes all.
        ([1, 1], [0, 1]),
        ([1, 2], [0, 0]),
        ([0, 0], [0, 0]),  # A value of a row each has no positions.
    ],
)
def test_a_site_that_is_followed_counts_what_came_before(
    lengths: list[int], n_before: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served([torch.full((2, n), float(n)) for n in lengths])
    if lengths == [0, 0]:
        served = Served([torch.ones(4), torch.ones(4)])
    clock, seen, mediator = Clock(), [], SimpleNamespace(iteration=None)

    def look(module: Any, args: Any, value: Tensor) -> None:
        seen.append((clock.call.step, clock.n_before, mediator.iteration))

    def double_first(module: Any, args: Any, value: Tensor) -> Tensor | None:
        return value * 2 if clock.call.step == 0 else None

    followed = Recorder.__new__(Recorder)
    followed._model = SimpleNamespace(  # type: ignore[assignment]
        envoy=lambda name: served, sitemap={"s": SimpleNamespace(tower="language")}
    )
    followed.session = SimpleNamespace(  # type: ignore[assignment]
        hooks=lambda name: [look, double_first], clocks={"language": clock}, calls_a_turn=lambda tower: 1
    )
    monkeypatch.setattr(recorder, "current", lambda name: mediator)
    followed.follow("s")
    assert seen == [(i, before, i) for i, before in enumerate(n_before)]
    assert list(served.written) == [0]
    assert torch.equal(served.written[0], served.values[0] * 2)


def test_a_sandbox_has_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "Session", lambda *args: SimpleNamespace(args=args))
    for in_process, grad_of in ((True, len), (True, None), (False, None)):
        model: Any = SimpleNamespace(
            in_process=in_process, wrapped=1, sitemap=2, points=3, is_guided=lambda a, g: (a, g)
        )
        args = Recorder(model, [], [], grad_of, {"x": 1}).session.args  # type: ignore[attr-defined]
        assert args[5] is (grad_of is not None)
        assert (args[6] is None) is in_process  # There it is told by the model.
        assert in_process or args[6]("guidance") == ({"x": 1}, "guidance")
    model = SimpleNamespace(in_process=False)
    with pytest.raises(NotImplementedError, match=r"runs blocks in a sandbox.*where there are no gradients"):
        Recorder(model, [], [], lambda output: output, {})


class Sent:
    """What a sandbox is sent, by location."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def value(self, location: str) -> Any:
        return self.values[location]


def in_sandbox(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], *, stock: bool) -> Any:
    monkeypatch.setattr(envoys, "Mediator", Sent(values))
    envoy = envoys.SiteEnvoy.__new__(envoys.SiteEnvoy)
    envoy.site = site(Output("", chunk=(2, 1)))
    envoy._point = SimpleNamespace(location="s")  # type: ignore[assignment]
    envoy._model = SimpleNamespace(  # type: ignore[assignment]
        in_process=False,
        on_stock_service=stock,
        path="model",
        points=SimpleNamespace(n_heads=lambda site: None),
    )
    return envoy


@pytest.mark.parametrize("stock", [True, False])
def test_what_is_assigned_in_a_sandbox_is_written_into_what_it_sends_back(
    stock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, own = torch.zeros(1, 4), torch.zeros(2, 1).T
    envoy = in_sandbox(monkeypatch, {"model.layer.output": (None, raw), "s": own}, stock=stock)
    envoy.output = torch.tensor([[1.0, 2]])
    assert raw.tolist() == [[0, 0, 1, 2] if stock else [0, 0, 0, 0]]
    assert own.tolist() == [[0, 0] if stock else [1, 2]]
    assert envoy.output.tolist() == [[1, 2]]
    if not stock:
        assert envoy.output is own
    assert own.is_contiguous()
    for wrong, what in ((torch.zeros(1, 3), r"\(1, 3\)"), ("x", "str")):
        with pytest.raises(InputError, match=rf"x is \(1, 2\) here and was set to {what}"):
            envoy.output = wrong
    assert envoy.output.tolist() == [[1, 2]]


def test_a_value_out_of_order_in_a_sandbox_is_laid_out_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.arange(6.0).view(2, 3).T
    envoy = in_sandbox(monkeypatch, {"s": value}, stock=False)
    assert envoy.output is value
    assert value.is_contiguous()
    assert value.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_is_inside_a_loop_is_told_by_its_module() -> None:
    inner, outer = nn.Identity(), nn.Identity()
    made = SiteInterleaver()
    made._loop = "model.unet"
    paths = {id(inner): "model.unet.mid", id(outer): "model.unets"}
    made.envoys = {i: SimpleNamespace(path=path) for i, path in paths.items()}  # type: ignore[assignment]
    at = [SimpleNamespace(module=inner), SimpleNamespace(module=outer)]
    hooks = {"in": at, "out": at[::-1], "none": []}  # The first of a point's modules is where it is.
    made.points = {n: SimpleNamespace(module_hooks=h) for n, h in hooks.items()}  # type: ignore[assignment]
    inside = {
        "in": True,
        "out": False,
        "none": False,
        "model.unet": True,
        "model.unet.x": True,
        "model.vae": False,
    }
    assert {name: made._in_loop(name) for name in inside} == inside
    assert made._in_loop(None) is False
    made._loop = ""
    assert made._in_loop("in") is False


def test_blocks_that_wait_for_a_next_step_are_told_that_the_run_is_over() -> None:
    """A reply is what was requested: END for a value; a request that writes gets none."""

    class Waiting:
        def __init__(self, event: Any, provider: str, n: int = 1) -> None:
            self.alive, self.replies, self.n = True, [], n
            self.pending: Any = SimpleNamespace(provider=provider, event=event)

        def switch(self, *reply: Any) -> Any:
            self.replies.append(reply)
            return self.pending if len(self.replies) < self.n else None

    twice, other = Waiting(Event.VALUE, "step", 2), Waiting(Event.VALUE, "model.output")
    writes, dead = Waiting(Event.SWAP, "step"), Waiting(Event.VALUE, "step")
    dead.alive = False
    made, indexed = SiteInterleaver(), []
    made._reindex_parked = lambda: indexed.append(True)  # type: ignore[method-assign]
    made.mediators = [other, dead]  # type: ignore[list-item]
    made._end_loops()
    assert indexed == []
    made.mediators = [twice, other, writes, dead]  # type: ignore[list-item]
    made._end_loops()
    assert [m.replies for m in (twice, other, writes, dead)] == [[(END,), (END,)], [], [()], []]
    assert indexed == [True]


# --- copies ------------------------------------------------------------------------------------------------


def test_a_model_with_edits_is_not_copied() -> None:
    case = tiny.clip_text()
    traced = TracedModel(case.model)
    copied = copy.deepcopy(traced)
    traced._edits.append(lambda: None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^This model has edits, which are its own\. Copy it before they"):
        copy.deepcopy(traced)
    traced._edits.clear()
    case.model.get_input_embeddings().weight.data.zero_()
    read = ["text.hook_embed"]
    assert not copied.run(case.inputs, read=read)[read[0]].equal(traced.run(case.inputs, read=read)[read[0]])
