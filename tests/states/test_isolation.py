"""One run does not feel another, and leaves nothing behind: threads, runs inside runs, errors, interrupts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import diffusers
import pytest
import tiny
import torch
from model_state import snapshot, stays
from torch import Tensor

import mm_adapters as mm
from mm_adapters.runs import turns
from tests.states.kinds import KINDS, call, numbers

ENGINES = ("hooked", "nnsight")
both = pytest.mark.parametrize("engine", ENGINES)
every_kind = pytest.mark.parametrize("name", KINDS)


class _Kept:
    """A model of each kind and engine, made once: every test here leaves it as it was."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Any] = {}

    def __call__(self, name: str, engine: str) -> tuple[Any, dict[str, Any], Callable[[], Tensor]]:
        kind = KINDS[name]
        if (name, engine) not in self.models:
            self.models[name, engine] = mm.wrap(kind.fresh(), engine=engine)
        model = self.models[name, engine]
        return model, kind.inputs(), lambda: call(kind, model.wrapped)


kept = _Kept()


def resid(name: str) -> str:
    return f"{KINDS[name].prefix}.hook_resid_post"


def run_beside(slow: Callable[[Callable[[], None]], None], other: Callable[[], Any]) -> Any:
    """What `other` gives in a thread that starts when `slow` has begun, in another thread, and says so."""
    begun, seen = threading.Event(), []

    def first() -> None:
        slow(begun.set)

    def second() -> None:
        begun.wait(20)
        seen.append(other())

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return seen[0]


@both
@every_kind
def test_a_run_in_another_thread_waits_for_the_edit_of_this_one(name: str, engine: str) -> None:
    model, inputs, output = kept(name, engine)
    right = output()
    with stays(model, output):

        def edited(begun: Callable[[], None]) -> None:
            def zero(v: Tensor) -> Tensor:
                begun()
                threading.Event().wait(0.2)
                return v * 0

            run = model.run(inputs, edit=[mm.Edit(resid(name), zero)])
            assert not torch.equal(numbers(run.output), right)

        run = run_beside(edited, lambda: model.run(inputs, read=[resid(name)]))
    assert torch.equal(numbers(run.output), right)
    value = run[resid(name)]
    assert torch.equal(value, model.run(inputs, read=[resid(name)])[resid(name)])


@pytest.mark.parametrize("name", ["contrastive", "vlm"])
def test_the_two_engines_of_one_module_take_turns(name: str) -> None:
    kind = KINDS[name]
    raw = kind.fresh()
    hooked, traced = mm.wrap(raw), mm.wrap(raw, engine="nnsight")
    right = call(kind, raw)

    def edited(begun: Callable[[], None]) -> None:
        def zero(v: Tensor) -> Tensor:
            begun()
            threading.Event().wait(0.2)
            return v * 0

        traced.run(kind.inputs(), edit=[mm.Edit(resid(name), zero)])

    run = run_beside(edited, lambda: hooked.run(kind.inputs()))
    assert torch.equal(numbers(run.output), right)


@every_kind
@pytest.mark.parametrize("part", ["hook_resid_post", "attn.hook_q", "attn.hook_pattern", "attn.hook_z"])
def test_a_run_inside_an_edit_is_unedited_and_the_outer_one_goes_on(name: str, part: str) -> None:
    model, inputs, output = kept(name, "hooked")
    site, inner = f"{KINDS[name].prefix}.{part}", []
    watched = list({site, resid(name)})
    right = output()
    alone = model.run(inputs, edit=[mm.Edit(site, lambda v: v / 2)], read=watched)

    def nest(v: Tensor) -> Tensor:
        inner.append(model.run(inputs, read=watched))
        inner.append(model(**inputs))
        return v / 2

    with stays(model, output):
        outer = model.run(inputs, edit=[mm.Edit(site, nest)], read=watched)
    assert torch.equal(numbers(inner[0].output), right)
    assert torch.equal(numbers(inner[1]), right)
    assert torch.equal(inner[0][site], model.run(inputs, read=[site])[site])
    assert torch.equal(numbers(outer.output), numbers(alone.output))
    for at in watched:
        assert torch.equal(outer[at], alone[at])
    assert outer.receipts[0].fired == alone.receipts[0].fired


def test_a_hook_of_transformer_lens_may_run_the_model() -> None:
    model, inputs, output = kept("vlm", "hooked")
    right, seen = output(), []

    def nest(v: Tensor, hook: Any) -> Tensor:
        _, cache = model.run_with_cache(**inputs, names_filter=[resid("vlm")])
        seen.append(cache[resid("vlm")])
        return v * 0

    with stays(model, output):
        model.run_with_hooks(**inputs, fwd_hooks=[(resid("vlm"), nest)])
    assert torch.equal(seen[0], model.run(inputs, read=[resid("vlm")])[resid("vlm")])
    assert torch.equal(output(), right)


@every_kind
def test_a_traced_run_inside_its_own_model_is_refused_before_it_begins(name: str) -> None:
    model, inputs, output = kept(name, "nnsight")

    def nest(v: Tensor) -> Tensor:
        model.run(inputs)
        return v

    with stays(model, output), pytest.raises(mm.ModelBusyError, match="inside a run of the same model"):
        model.run(inputs, edit=[mm.Edit(resid(name), nest)])


@pytest.mark.parametrize(("outer", "inner"), [("hooked", "nnsight"), ("nnsight", "hooked")])
def test_one_engine_runs_inside_the_other(outer: str, inner: str) -> None:
    kind = KINDS["contrastive"]
    raw, seen = kind.fresh(), []
    right = call(kind, raw)
    around, within = mm.wrap(raw, engine=outer), mm.wrap(raw, engine=inner)
    half = around.run(kind.inputs(), edit=[mm.Edit(resid("contrastive"), lambda v: v / 2)])

    def nest(v: Tensor) -> Tensor:
        seen.append(within.run(kind.inputs(), read=[resid("contrastive")]))
        return v / 2

    with stays(around, lambda: call(kind, raw)):
        run = around.run(kind.inputs(), edit=[mm.Edit(resid("contrastive"), nest)])
    assert torch.equal(numbers(seen[0].output), right)
    assert torch.equal(numbers(run.output), numbers(half.output))


@both
@every_kind
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("part", ["attn.hook_pattern", "hook_resid_post"])
def test_whatever_is_raised_in_an_edit_the_model_stays_as_it_was(
    name: str, engine: str, error: type[BaseException], part: str
) -> None:
    model, inputs, output = kept(name, engine)
    site = f"{KINDS[name].prefix}.{part}"

    def fail(v: Tensor) -> Tensor:
        raise error("mine")

    with stays(model, output):
        with pytest.raises(error, match="mine"):
            model.run(inputs, edit=[mm.Edit(site, fail)], read=[resid(name)])
        with pytest.raises(error, match="mine"):
            model.run(inputs, read=[mm.Read(site, reduce=fail)])


@both
@every_kind
def test_an_interrupt_in_the_library_s_own_code_leaves_nothing(name: str, engine: str) -> None:
    model, inputs, output = kept(name, engine)
    block = KINDS[name].module(model.wrapped)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    sites = [resid(name), f"{KINDS[name].prefix}.attn.hook_pattern"]
    with stays(model, output):
        handle = block.register_forward_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                model.run(inputs, read=sites, edit=[mm.Edit(sites[1], lambda v: v)])
        finally:
            handle.remove()


def test_threads_that_wait_for_each_other_s_models_are_told() -> None:
    """Each has a model in a run and asks for the other's: one gives way, neither hangs."""
    first, inputs, output = kept("contrastive", "hooked")
    second, asked, _ = kept("vlm", "hooked")
    meet, told = threading.Barrier(2, timeout=20), []

    def across(own: Any, given: Any, site: str, other: Any, others: Any) -> None:
        def nest(v: Tensor) -> Tensor:
            meet.wait()
            with suppress(mm.ModelBusyError):
                other.run(others)
                return v
            told.append(site)
            return v

        own.run(given, edit=[mm.Edit(site, nest)])

    with stays(first, output):
        threads = [
            threading.Thread(target=across, args=(first, inputs, resid("contrastive"), second, asked)),
            threading.Thread(target=across, args=(second, asked, resid("vlm"), first, inputs)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(told) == 1


def test_an_edit_that_waits_for_a_thread_that_waits_for_its_model_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "BLOCKED_S", 0.5)
    model, inputs, output = kept("contrastive", "hooked")
    told: list[BaseException] = []

    def run() -> None:
        try:
            model.run(inputs)
        except mm.ModelBusyError as error:
            told.append(error)

    def spawn(v: Tensor) -> Tensor:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
        return v

    with stays(model, output):
        model.run(inputs, edit=[mm.Edit(resid("contrastive"), spawn)])
    assert len(told) == 1
    assert "another thread" in str(told[0]).lower()


def test_a_snapshot_notices_each_thing_that_a_run_may_leave() -> None:
    model, _, output = kept("contrastive", "hooked")
    before = snapshot(model, output)
    block = KINDS["contrastive"].module(model.wrapped)
    handle = block.register_forward_hook(lambda *_: None)
    assert "hooks" in snapshot(model, output).changes(before)[0]
    handle.remove()
    block.train()
    assert "modes" in snapshot(model, output).changes(before)[0]
    block.eval()
    with torch.no_grad():
        assert "torch_is_set" in snapshot(model, output).changes(before)[0]
        weight = next(block.parameters())
        weight.view(-1)[0] += 1
        said = snapshot(model, output).changes(before)
        assert any("the weight" in line for line in said)
        assert "the output" in said
        weight.copy_(before.weights[next(n for n, p in model.wrapped.named_parameters() if p is weight)])
    assert snapshot(model, output).changes(before) == []


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux", "heun"])
def test_a_loop_inside_a_loop_leaves_the_outer_ones_schedule_and_options(name: str) -> None:
    case = tiny.CASES["stable_diffusion" if name == "heun" else name]()
    if name == "heun":
        case.model.scheduler = diffusers.HeunDiscreteScheduler()
    model, site = mm.wrap(case.model), "denoiser.hook_out"
    other = {**case.inputs, "num_inference_steps": 1, "guidance_scale": 1.0}
    inner = model.run(other, read=[site])
    plain = model.run(case.inputs, read=[site])
    seen: list[Any] = []

    def nest(value: Tensor) -> Tensor:
        seen.append(model.run(other, read=[site]))
        return value

    outer = model.run(case.inputs, read=[site], edit=[mm.Edit(site, nest)])
    assert torch.equal(outer[site], plain[site])
    assert outer.calls == plain.calls
    assert outer.rows == plain.rows
    assert torch.equal(case.head(outer.output), case.head(plain.output))
    assert all(torch.equal(run[site], inner[site]) for run in seen)
