"""pyvene's IntervenableModel and ours on the same models, most of which no family of ours covers: equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pyvene as pv
import torch
from foreign.pyvene.behaviours import AT, BEHAVIOURS, made, vanilla
from foreign.pyvene.models import BASE, SOURCE, gpt2, mlp
from torch import Tensor, nn
from transformers.utils import ModelOutput

from integrations.pyvene import MMIntervenableModel
from integrations.pyvene._members import MEMBERS
from mm_adapters import CheckpointError, InputError

# pyvene 0.1.8 copies a number into a tensor in a way that torch warns of, and prints where it saves.
pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")

# The behaviour that shows each member that works.
SHOWN = {
    "BACKEND": "modes_and_devices",
    "count_parameters": "the_models_weights_may_train",
    "disable_intervention_gradients": "gradients_are_cleared",
    "disable_model_gradients": "the_models_weights_are_frozen",
    "enable_model_gradients": "the_models_weights_may_train",
    "eval": "modes_and_devices",
    "eval_alignment": "a_metric_over_batches",
    "forward": "at_several_positions",
    "generate": "generation_from_a_source",
    "get_cached_activations": "caches_are_empty_after_a_call",
    "get_cached_hot_activations": "caches_are_empty_after_a_call",
    "get_device": "modes_and_devices",
    "get_trainable_parameters": "learns_rotated",
    "load": "weights_are_saved_and_read",
    "load_intervention": "test_weights_alone_are_saved_and_read",
    "named_parameters": "learns_low_rank",
    "save": "weights_are_saved_and_read",
    "save_intervention": "test_weights_alone_are_saved_and_read",
    "set_device": "modes_and_devices",
    "set_temperature": "learns_boundless",
    "set_zero_grad": "gradients_are_cleared",
    "train": "modes_and_devices",
    "zero_grad": "gradients_are_cleared",
}


def check_equal(theirs: Any, ours: Any, where: str = "") -> None:
    """The same structure, names and numbers, bit for bit."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, Mapping | ModelOutput):
        assert set(ours) == set(theirs), where
        for name in theirs:
            check_equal(theirs[name], ours[name], f"{where}[{name!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            check_equal(a, b, f"{where}[{i}]")
    elif not hasattr(theirs, "key_cache") and not hasattr(theirs, "layers"):  # A cache of keys.
        assert ours == theirs, where


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_ours_does_as_pyvenes(name: str) -> None:
    check_equal(BEHAVIOURS[name](pv.IntervenableModel), BEHAVIOURS[name](MMIntervenableModel))


def test_what_is_restated_is_enough() -> None:
    assert len(BEHAVIOURS) >= 25


def test_the_table_has_every_member_of_the_installed_version() -> None:
    bases = [c for c in pv.IntervenableModel.__mro__ if c.__module__.startswith("pyvene.")]
    assert set(MEMBERS) == {name for c in bases for name in vars(c) if not name.startswith("_")}
    works = {name for name, reason in MEMBERS.items() if not reason}
    assert works == set(SHOWN)
    assert set(SHOWN.values()) <= {*BEHAVIOURS, *globals()}


def test_members_take_what_theirs_take() -> None:
    for name in MEMBERS:
        theirs, ours = (getattr(c, name) for c in (pv.IntervenableModel, MMIntervenableModel))
        if inspect.isfunction(theirs):
            takes = inspect.signature(ours).parameters
            is_open = any(p.kind is p.VAR_KEYWORD for p in takes.values())
            assert is_open or set(inspect.signature(theirs).parameters) <= set(takes), name


def test_what_takes_every_hook_off_is_refused() -> None:
    with pytest.raises(InputError, match="takes every hook off the model"):
        made(MMIntervenableModel, gpt2(), vanilla()).train_alignment([], None, None, None)


def test_weights_alone_are_saved_and_read(tmp_path: Path) -> None:
    one = {"intervention_type": pv.RotatedSpaceIntervention}
    model = made(MMIntervenableModel, gpt2(), one)
    want = model(BASE, [SOURCE], AT)[1].logits
    model.save_intervention(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    other = made(MMIntervenableModel, gpt2(), one)
    torch.nn.init.orthogonal_(weights := torch.empty(24, 24))
    other.interventions[other.sorted_keys[0]].rotate_layer.weight = weights
    part = [[[0, 1, 2]]] * 2
    assert not torch.equal(_half(other), _half(model)), part
    other.load_intervention(tmp_path)
    assert torch.equal(_half(other), _half(model))
    assert torch.equal(other(BASE, [SOURCE], AT)[1].logits, want)
    with pytest.raises(CheckpointError, match="Is it the right folder"):
        other.load_intervention(tmp_path / "nowhere")
    low_rank = {"intervention_type": pv.LowRankRotatedSpaceIntervention, "low_rank_dimension": 4}
    with pytest.raises(CheckpointError, match="what trains here"):
        made(MMIntervenableModel, gpt2(), low_rank).load_intervention(tmp_path)


def _half(model: Any) -> Tensor:
    """A rotation swaps all of a value whatever it is; half of its directions tell."""
    key = model.sorted_keys[0]
    return model.interventions[key].rotate_layer.weight[:12]


# ---- where pyvene leaves the model another -------------------------------------------------------


@pytest.fixture
def hooked() -> Iterator[tuple[nn.Module, list[int]]]:
    model, seen = gpt2(), []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    yield model, seen
    handle.remove()


def test_hooks_of_others_stay_on_a_model_of_pyvenes(hooked: Any) -> None:
    model, seen = hooked
    made(MMIntervenableModel, model, vanilla())(BASE, [SOURCE], AT)
    assert len(seen) == 2  # The source's call and the base's.
    model(**BASE)
    assert len(seen) == 3


def test_a_call_with_one_number_does_not_tie_the_next_to_the_first_rows_locations() -> None:
    """pyvene 0.1.8 stays with the first row's locations for good."""
    fresh = made(MMIntervenableModel, gpt2(), vanilla())
    want = fresh(BASE, [SOURCE], AT)[1].logits
    model = made(MMIntervenableModel, gpt2(), vanilla())
    model(BASE, [SOURCE], {"sources->base": 3})
    assert torch.equal(model(BASE, [SOURCE], AT)[1].logits, want)
    theirs = made(pv.IntervenableModel, gpt2(), vanilla())
    theirs(BASE, [SOURCE], {"sources->base": 3})
    assert not torch.equal(theirs(BASE, [SOURCE], AT)[1].logits, want)


def test_an_interrupted_call_leaves_no_hook() -> None:
    def broken(base: Tensor, source: Any) -> Tensor:
        raise KeyError("broken")

    model = mlp()
    one: dict[str, Callable[..., Any]] = {"intervention": broken}
    intervenable = made(MMIntervenableModel, model, one | {"component": "block_output", "layer": 0})
    vectors = {"inputs_embeds": torch.ones(2, 1, 8)}
    with pytest.raises(KeyError, match="broken"):
        intervenable(vectors, [vectors], {"sources->base": 0})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
