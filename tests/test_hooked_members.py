"""Every public member of HookedTransformer and ActivationCache, called on a tower beside HookedTransformer.

The members are the host's own list, so that a member that a new version adds has to get a row. A call gives
the same, or both refuse it, or the tower refuses it by an error of ours; anything else is a failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

from mm_adapters import _errors
from tests.hooked_members import CACHE, MODULE, OWN, TOKENS, WEIGHTS, Call
from tests.hooked_opt import pair

NAMED = tuple(error for error in vars(_errors).values() if isinstance(error, type))

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = {"model": {**OWN, **WEIGHTS, **MODULE}, "cache": CACHE}
CALLS = [
    pytest.param(of, call, id=f"{of}-{member}-{i}")
    for of, members in ALL.items()
    for member, calls in members.items()
    for i, call in enumerate(calls)
]

# What a tower refuses though HookedTransformer does it, with why. Weight processing is not counted here.
REFUSED = {
    "model-forward-16": "A return type that there is not; HookedTransformer logs a warning and returns None.",
    "model-run_with_cache-18": "A point that there is not; HookedTransformer's cache is empty.",
    "model-generate-15": "An option that nobody takes; HookedTransformer drops it.",
    "model-to_tokens-5": "A text longer than the context; HookedTransformer cuts it without a word.",
    "model-to_tokens-6": "The same, where HookedTransformer gives more tokens than it can run.",
    "model-dataset-0": "HookedTransformer's own training data, which is None until it is loaded.",
    "model-blocks-6": "An OPT's block has no module that is its MLP.",
}
# What fails in HookedTransformer, and works in a tower.
BETTER = {"model-bfloat16-0": "Its LayerNorm leaves float32 in the stream."}
# Compared with a HookedTransformer whose final norm is folded: a tower's directions hold the norm's gain.
FOLDED = ("tokens_to_residual_directions", "logit_attrs")


def public(owner: Any) -> set[str]:
    """The names of an instance, without private ones and what nnsight puts on every object."""
    return {name for name in dir(owner) if not name.startswith("_") and not hasattr(object, name)}


def test_every_public_member_has_a_call() -> None:
    theirs = pair().theirs
    # transformers puts `smart_apply` on every module.
    assert public(theirs) - {"smart_apply"} == set(ALL["model"])
    _, cache = theirs.run_with_cache(TOKENS)
    assert public(cache) - {"cache_dict", "model", "has_batch_dim", "has_embed", "has_pos_embed"} == {
        name for name in CACHE if not name.startswith("__")
    }


def test_there_are_hundreds_of_calls() -> None:
    assert len(CALLS) >= 214
    refusable = [p for p in CALLS if p.id.split("-")[1] not in WEIGHTS]
    assert len(REFUSED) <= 0.05 * len(refusable)
    assert set(REFUSED) <= {p.id for p in CALLS}


@pytest.mark.parametrize(("of", "call"), CALLS)
def test_a_call_is_the_same_or_refused(of: str, call: Call, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    theirs, ours = _both(of, folded=name.split("-")[1] in FOLDED)
    want, got = _outcome(call, theirs), _outcome(call, ours)
    if isinstance(want, Exception) and name not in BETTER:
        assert isinstance(got, Exception), f"HookedTransformer says {want!r}, the tower gives {got!r}"
    elif name.split("-")[1] in WEIGHTS or name in REFUSED:
        assert isinstance(got, NAMED), got
    elif isinstance(got, Exception):
        raise got
    elif name in BETTER:
        assert isinstance(want, Exception)
    else:
        _assert_same(got, want)


def _both(of: str, folded: bool) -> tuple[Any, Any]:
    both = pair()
    if folded:
        both.theirs.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    if of == "model":
        return both.theirs, both.ours
    return both.theirs.run_with_cache(TOKENS)[1], both.ours.run_with_cache(TOKENS)[1]


def _outcome(call: Call, owner: Any) -> Any:
    torch.manual_seed(0)
    grads = torch.is_grad_enabled()
    try:
        return call(owner)
    except Exception as error:  # noqa: BLE001  # What it is, is judged.
        return error
    finally:
        torch.set_grad_enabled(grads)


def _assert_same(got: Any, want: Any) -> None:
    """Equal in kind and number."""
    if isinstance(want, Tensor):
        assert isinstance(got, Tensor)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    elif isinstance(want, ActivationCache | Mapping):
        assert sorted(got.keys()) == sorted(want.keys())
        for key in want:
            _assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            _assert_same(ours, theirs)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=1e-4)
    else:
        assert got == want
