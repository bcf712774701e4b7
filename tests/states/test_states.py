"""In every state of a model reads, edits and weights are the library's own, or one error says why not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mm_adapters as mm
from tests.states.kinds import KINDS, Kind, Seen, call, numbers, watch
from tests.states.table import STATES, State

ENGINES = ("hooked", "nnsight")


def cells() -> list[Any]:
    """Every state with every engine and kind of model that can be in it."""
    return [
        pytest.param(s, k, e, id=f"{s.name.replace(' ', '_')}-{k}-{e}")
        for k in KINDS
        for s in STATES
        if k in s.kinds
        for e in ENGINES
    ]


@pytest.mark.filterwarnings("ignore")  # What libraries say of what they are asked for here.
@pytest.mark.parametrize(("state", "name", "engine"), cells())
def test_reads_edits_and_weights_are_the_models_own_in_this_state(
    state: State, name: str, engine: Any
) -> None:
    kind = KINDS[name]
    raw = kind.fresh()
    before = kind.before()
    weight_before = kind.module(raw, f"{kind.attention}.{kind.query}").weight.detach().clone()
    model = mm.wrap(raw, engine=engine)
    close(numbers(model.run(kind.inputs(), read=[f"{kind.prefix}.hook_resid_post"]).output), before.output, 0)

    given = state.put(kind, raw)
    right = before if state.as_before else watch(kind, raw)
    if not state.as_before:
        assert not torch.allclose(right.output, before.output, atol=1e-4), "the state changes nothing"
    with torch.no_grad():
        weight = state.weight(kind, raw).clone() if state.weight else right_weight(kind, raw, weight_before)
    refused = state.refusal.parts if state.refusal else ()
    check(state, kind, model, right, weight, refused)
    if engine == "hooked":  # Between the two the model runs by itself, so that compiled code is there.
        close(call(kind, given), right.output, 1e-5)
    if engine == "hooked" or given is not raw:
        check(state, kind, mm.wrap(given, engine=engine), right, weight, refused)


def right_weight(kind: Kind, raw: Any, before: Tensor) -> Tensor:
    """The query matrix that a plain linear holds; that of before where there is none."""
    linear = kind.module(raw, f"{kind.attention}.{kind.query}")
    is_plain = type(linear) is nn.Linear and not linear.weight.is_meta
    return linear.weight if is_plain else before


def check(
    state: State, kind: Kind, model: Any, right: Seen, weight: Tensor, refused: tuple[str, ...]
) -> None:
    parts = ("attn.hook_q", "attn.hook_z", "hook_resid_post", "attn.hook_v", "attn.hook_pattern")
    sites = [f"{kind.prefix}.{part}" for part in parts]
    run = model.run(kind.inputs(), read=[s for s in sites if not refused or not s.endswith(refused)])
    close(numbers(run.output), right.output, state.atol)
    values = {s: v[0] if kind.zoo == "tiny-sd" else v for s, v in run.values.items()}
    for site, value in zip(sites, right, strict=False):
        if site in values:
            close(values[site], value, state.atol)
    if not refused:  # What the heads attend to, with what is there, is what leaves them.
        v, pattern = values[sites[3]].transpose(1, 2), values[sites[4]]
        attended = pattern @ v.repeat_interleave(pattern.shape[1] // v.shape[1], 1)
        close(attended.transpose(1, 2), right.z, 1e-5)
    half = mm.Edit(sites[2], lambda v: v / 2)
    edited = model.run(kind.inputs(), edit=[half])
    close(numbers(edited.output), right.halved, max(state.atol, 1e-5))
    assert edited.receipts[0].fired == 1

    tower = model.towers[kind.tower]
    w_q = tower.weights(kind.layer).names("attn")["W_Q"]()
    close(w_q, weight.T.unflatten(1, (kind.heads, -1)).transpose(0, 1), state.off_weight)

    for part in refused:
        site = f"{kind.prefix}.{part}"
        if state.refusal and state.refusal.tower:
            site = next(s.name for s in model.sites(f"{state.refusal.tower}.*{part}") if s.reason is None)
        for asked in ({"read": [site]}, {"edit": [mm.Edit(site, lambda v: v)]}):
            check_refused(state, kind, model, asked)


def check_refused(state: State, kind: Kind, model: Any, asked: dict[str, Any]) -> None:
    """The error says what to do, comes of no other, and comes before the first module runs."""
    assert state.refusal is not None
    ran: list[None] = []
    handle = model.wrapped.text_encoder.register_forward_pre_hook(lambda *_: ran.append(None))
    try:
        with pytest.raises(state.refusal.error, match=re.escape(state.refusal.says)) as told:
            model.run(kind.inputs(), **asked)
    finally:
        handle.remove()
    assert told.value.__cause__ is None
    assert not ran


def close(seen: Tensor, right: Tensor, atol: float) -> None:
    assert seen.shape == right.shape
    torch.testing.assert_close(seen, right, atol=atol, rtol=0)
