"""In every state of a model, reads, edits and weights are those of the library's model, or one error says why."""

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
def test_reads_edits_and_weights_are_the_models_own_in_this_state(state: State, name: str, engine: Any) -> None:
    kind = KINDS[name]
    raw = kind.fresh()
    before = watch(kind, raw)
    weight_before = kind.module(raw, f"{kind.attention}.{kind.query}").weight.detach().clone()
    model = mm.wrap(raw, engine=engine)
    check(state, kind, model, before, weight_before, refused=())

    given = state.put(kind, raw)
    right = before if state.as_before else watch(kind, raw)
    if not state.as_before:
        assert not torch.allclose(right.output, before.output, atol=1e-4), "the state changes nothing"
    with torch.no_grad():
        weight = state.weight(kind, raw).clone() if state.weight else right_weight(kind, raw, weight_before)
    refused = state.refusal.parts if state.refusal else ()
    for lens in (model, mm.wrap(given, engine=engine)):
        check(state, kind, lens, right, weight, refused)
    assert torch.allclose(call(kind, raw), right.output, atol=1e-5), "the model's own output moved"


def right_weight(kind: Kind, raw: Any, before: Tensor) -> Tensor:
    """The query matrix that a plain linear holds; that of before where there is none."""
    linear = kind.module(raw, f"{kind.attention}.{kind.query}")
    is_plain = type(linear) is nn.Linear and not linear.weight.is_meta
    return linear.weight if is_plain else before


def check(
    state: State, kind: Kind, model: Any, right: Seen, weight: Tensor, refused: tuple[str, ...]
) -> None:
    sites = [f"{kind.prefix}.{part}" for part in ("attn.hook_q", "attn.hook_z", "hook_resid_post")]
    readable = [s for s in sites if not s.endswith(refused)] if refused else sites
    run = model.run(kind.inputs(), read=readable)
    close(numbers(run.output), right.output, state.atol)
    for site, value in zip(sites, right, strict=True):
        if site in readable:
            seen = run[site][0] if kind.zoo == "tiny-sd" else run[site]
            close(seen, value, state.atol)
    half = mm.Edit(sites[2], lambda v: v / 2)
    edited = model.run(kind.inputs(), edit=[half])
    close(numbers(edited.output), right.halved, max(state.atol, 1e-5))
    assert edited.receipts[0].fired == 1

    tower = model.towers[kind.tower]
    w_q = tower.weights(kind.layer).names("attn")["W_Q"]()
    close(w_q, weight.T.unflatten(1, (kind.heads, -1)).transpose(0, 1), state.off_weight)

    for part in refused:
        assert state.refusal is not None
        site = f"{kind.prefix}.{part}"
        if state.refusal.tower:
            site = next(s.name for s in model.sites(f"{state.refusal.tower}.*{part}") if s.reason is None)
        ran: list[None] = []
        root = model.wrapped.text_encoder
        handle = root.register_forward_pre_hook(lambda *_: ran.append(None))
        try:
            for asked in ({"read": [site]}, {"edit": [mm.Edit(site, lambda v: v)]}):
                with pytest.raises(state.refusal.error, match=re.escape(state.refusal.says)) as told:
                    model.run(kind.inputs(), **asked)
                assert told.value.__cause__ is None
        finally:
            handle.remove()
        assert not ran, "it was refused when the model had run"
    if not refused:
        pattern, v = f"{kind.prefix}.attn.hook_pattern", f"{kind.prefix}.attn.hook_v"
        inner = model.run(kind.inputs(), read=[pattern, v, sites[1]])
        attended = inner[pattern] @ inner[v].transpose(-2, -3).repeat_interleave(
            inner[pattern].shape[-3] // inner[v].shape[-2], -3
        )
        close(attended.transpose(-2, -3), inner[sites[1]], 1e-5)


def close(seen: Tensor, right: Tensor, atol: float) -> None:
    assert seen.shape == right.shape
    torch.testing.assert_close(seen, right, atol=atol, rtol=0)
