"""The contract that every public method keeps, on every tiny family of its kinds, under both engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from tests.methods.contract import check, public
from tests.methods.contract.families import ENGINES, Engine, family
from tests.methods.contract.kinds import FAMILIES, KINDS, families_of, kind_of
from tests.methods.contract.method import Method
from tests.methods.contract.table import METHODS, OWN_REASONS


def cases() -> list[Any]:
    """Every (method, family, engine), family by family, so that a model is built once."""
    order = families_of(KINDS)
    pairs = [(m, f) for m in METHODS for f in families_of(m.kinds)]
    pairs.sort(key=lambda pair: order.index(pair[1]))
    return [pytest.param(m.name, f, e, id=f"{m.name}-{f}-{e}") for m, f in pairs for e in ENGINES]


@pytest.mark.parametrize(("method", "name", "engine"), cases())
def test_a_method_gives_the_same_numbers_under_both_engines_or_says_what_is_missing(
    method: str, name: str, engine: Engine, record_property: Callable[[str, object], None]
) -> None:
    result = check.outcome(method, name, engine)
    assert result.hooks_left == 0
    assert not result.moved, "the model's own output is another than before"
    record_property("contract", "refused" if result.refusal else "ran")
    if result.refusal is not None:
        check_refusal(method, name, engine, result)
        return
    assert result.numbers, "it gave no number"
    values = {k: v for k, v in result.numbers.items() if v.numel()}
    assert values
    unsound = [k for k, v in values.items() if not torch.isfinite(v).all()]
    assert not unsound, f"NaN or infinite: {unsound}"
    together = torch.cat([v.flatten().double() for v in values.values()])
    assert together.max() > together.min(), "everything is constant"
    if engine != ENGINES[0]:
        check_same(check.BY_NAME[method], check.outcome(method, name, ENGINES[0]), result)


def check_refusal(method: str, name: str, engine: Engine, result: check.Outcome) -> None:
    """A refusal comes before any forward, is the same in both engines, and follows from the record."""
    error, tiny_family = result.refusal, family(name)
    assert error is not None
    assert result.forwards == 0, f"{result.forwards} modules had run when it said: {error}"
    if check.own_reason(check.BY_NAME[method], check.given_of(name, engine), error) is None:
        missing = check.what_is_missing(tiny_family, tiny_family.model(engine), error)
        assert missing is not None, f"it names nothing that the record says is missing: {error}"
    if engine != ENGINES[0]:
        other = check.outcome(method, name, ENGINES[0]).refusal
        assert (type(other), str(other)) == (type(error), str(error))


def check_same(method: Method, one: check.Outcome, two: check.Outcome) -> None:
    """Both engines gave the same numbers."""
    assert one.refusal is None, f"{ENGINES[0]} refuses it: {one.refusal}"
    assert one.numbers.keys() == two.numbers.keys()
    for where, value in one.numbers.items():
        other = two.numbers[where]
        torch.testing.assert_close(
            other, value, rtol=method.tolerance, atol=method.tolerance, msg=lambda m, w=where: f"{w}: {m}"
        )


def test_every_public_method_that_takes_a_model_has_one_line() -> None:
    lines = Counter(method.name for method in METHODS)
    known = public.methods()
    assert not known.keys() - lines.keys(), "write them a line in tests/methods/contract/table.py"
    assert not lines.keys() - known.keys(), "no public method takes a model by these names"
    assert max(lines.values()) == 1
    for method in METHODS:
        assert method.fn is known[method.name]


def test_a_difference_between_the_engines_has_a_reason() -> None:
    assert all(bool(method.tolerance) == bool(method.why) for method in METHODS)


def test_few_refusals_have_a_reason_of_their_own() -> None:
    assert len(OWN_REASONS) <= 5
    assert all(reason.why for reason in OWN_REASONS)


def test_each_family_is_of_the_kind_its_record_says() -> None:
    assert sorted(families_of(KINDS)) == sorted(tiny.CASES), "name it in tests/methods/contract/kinds.py"
    for kind, families in FAMILIES.items():
        for name in families.split():
            assert kind_of(mm.SiteMap(family(name).case.model)) == kind, name
