"""A small part of the fuzzer, and the fuzzer itself: what is planted is seen."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import mm_adapters as mm
from tests.fuzz import indices, inputs, outcome
from tests.fuzz.call import Call, Expect, Mine, OneOf
from tests.fuzz.generate import generate
from tests.fuzz.inputs import Judge, failures, holds, shares, table
from tests.fuzz.models import subject
from tests.fuzz.outcome import Outcome, Verdict, difference, judge
from tests.fuzz.state import State
from tests.fuzz.subjects import Subject, plain_run

SEED, N = 91, 60
SITE = "vision.blocks.1.hook_resid_post"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def one() -> Subject:
    return subject("dinov2", "hooked")


@pytest.fixture
def state(one: Subject) -> State:
    return State(one)


@pytest.fixture
def given(one: Subject) -> dict[str, Any]:
    return one.draw(Random(0)).ours


def planted(one: Subject, perform: Callable[[], Any], expect: Expect = Expect.VALUE, **more: Any) -> Call:
    return Call("planted", "planted", expect, one, perform, **more)


def test_the_generated_calls_hold() -> None:
    judged = Judge(SEED)
    verdicts = [judged(i) for i in range(N)]
    assert holds(verdicts), "\n".join([*failures(verdicts, SEED), table(verdicts)])
    assert shares(verdicts)["valid"] >= inputs.LEAST_VALID


def test_a_number_gives_one_call() -> None:
    assert [generate(3, i).line() for i in range(12)] == [generate(3, i).line() for i in range(12)]
    assert len({generate(3, i).line() for i in range(12)}) == 12


def test_a_planted_silent_error_is_seen(one: Subject, state: State, given: dict[str, Any]) -> None:
    def right() -> dict[str, Any]:
        probe = one.probes[0]
        return {"value": plain_run(one, given, [probe])[1][probe.site][0]}

    for factor, came in ((1.0, Outcome.RIGHT), (1.01, Outcome.SILENT)):

        def perform(factor: float = factor) -> dict[str, Any]:
            return {"value": one.model.run(given, read=[SITE])[SITE] * factor}

        call = planted(one, perform, right=right)
        assert judge(call, state).outcome is came


def test_a_bad_call_without_an_error_is_silent(one: Subject, state: State) -> None:
    assert judge(planted(one, lambda: {"value": 1}, Expect.REFUSAL), state).outcome is Outcome.SILENT


def test_a_planted_hook_and_a_planted_weight_are_seen(one: Subject, state: State) -> None:
    handles: list[Any] = []
    module = one.model.wrapped.encoder.layer[0]

    def left() -> dict[str, Any]:
        handles.append(module.register_forward_hook(lambda *_: None))
        return {}

    verdict = judge(planted(one, left), state)
    assert verdict.outcome is Outcome.STATE
    assert "hooks of encoder.layer.0" in verdict.seen
    handles[0].remove()
    assert judge(planted(one, dict), state).outcome is Outcome.RIGHT
    weight = next(module.parameters())
    before = weight.detach().clone()

    def changed() -> dict[str, Any]:
        weight.data[0] += 1e-3
        return {}

    assert judge(planted(one, changed), state).outcome is Outcome.STATE
    weight.data.copy_(before)
    assert state.changed() == []


def test_a_mode_left_switched_is_seen_and_put_right(one: Subject, state: State) -> None:
    verdict = judge(planted(one, lambda: (torch.set_grad_enabled(False) and {}) or {}), state)
    assert verdict.outcome is Outcome.STATE
    assert torch.is_grad_enabled()


def _raising(error: Exception, cause: Exception | None = None, hide: bool = False) -> Callable[[], Any]:
    def perform() -> dict[str, Any]:
        try:
            if cause is not None:
                raise cause
        except type(cause or error):
            raise error from (None if hide else cause)
        raise error

    return perform


def test_errors_are_told_apart(one: Subject, state: State, given: dict[str, Any]) -> None:
    def late() -> dict[str, Any]:
        one.model.run(given)
        raise mm.InputError("rows=[7]")

    bad = Expect.REFUSAL
    clear = mm.InputError("rows=[7]: there are 2.")
    for perform, expect, came in (
        (_raising(KeyError("rows")), bad, Outcome.FOREIGN),
        (_raising(clear), bad, Outcome.CLEAR),
        (_raising(clear, IndexError("7")), bad, Outcome.FOREIGN),
        (_raising(clear, IndexError("7"), hide=True), bad, Outcome.CLEAR),
        (late, bad, Outcome.LATE),
        (_raising(clear), Expect.VALUE, Outcome.REFUSED),
        (_raising(Mine("mine")), Expect.OWN_ERROR, Outcome.CLEAR),
        (_raising(clear), Expect.OWN_ERROR, Outcome.FOREIGN),
    ):
        assert judge(planted(one, perform, expect), state).outcome is came
    assert judge(planted(one, late, bad, only_run_shows=True), state).outcome is Outcome.SHOWN


def test_what_stands_still_is_ended(one: Subject, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome, "SECONDS", 1)
    call = planted(one, lambda: time.sleep(5) or {}, Expect.EITHER)
    assert judge(call, state).outcome is Outcome.HANG


def test_the_shares_decide(one: Subject) -> None:
    def verdicts(**counts: int) -> list[Verdict]:
        bad = ("clear", "foreign")
        of = {name: Expect.REFUSAL if name in bad else Expect.VALUE for name in counts}
        by_name = {name: Outcome[name.upper()] for name in counts}
        return [
            Verdict(planted(one, dict, of[name]), by_name[name], "")
            for name, n in counts.items()
            for _ in range(n)
        ]

    assert holds(verdicts(right=100, clear=100))
    assert holds(verdicts(right=98, refused=2, clear=98, foreign=2))
    assert not holds(verdicts(right=97, refused=3, clear=98, foreign=2))
    assert not holds(verdicts(right=98, refused=2, clear=97, foreign=3))
    for broken in ("silent", "hang", "state"):
        assert not holds(verdicts(right=999, clear=999, **{broken: 1}))


def test_what_is_compared() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert difference(x, x) == ""
    assert difference(x[:1], x)
    assert difference(x + 0.01, x)
    assert difference([x, x], [x, x]) == ""
    assert difference([x], [x, x])
    assert difference(x, OneOf((x + 1, x))) == ""
    assert difference(x, OneOf((x + 1, x + 2)))
    assert difference(0.0, 0.5)
    assert difference(0.5, 0.5) == ""


def test_an_index_means_what_python_says() -> None:
    values = torch.arange(7)
    for seed in range(200):
        index = indices.valid(Random(seed), 7, "rows")
        given = index.make()
        at = given if isinstance(given, slice | torch.Tensor | np.ndarray) else [int(i) for i in given]
        assert values[at].tolist() == list(index.means or ())
