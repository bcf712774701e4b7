"""What a tower refuses before it runs, and the tokenizer that it tells."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mm_adapters as mm
from tests.hooked_opt import pair, raw_opt, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.*:DeprecationWarning")
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "verbose": False}


@pytest.fixture
def tower() -> Any:
    return mm.wrap(raw_opt(), tokenizer=tokenizer()).language


def after(n: int) -> Any:
    """A criterion: ends every row at so many tokens."""
    return lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= n)


def test_a_tokenizer_without_padding_pads_with_its_end_as_hooked_transformers_does() -> None:
    theirs = pair().theirs
    plain = tokenizer()
    plain.pad_token = None
    tower = mm.wrap(raw_opt(), tokenizer=plain).language
    assert tower.tokenizer.pad_token_id == theirs.tokenizer.pad_token_id == plain.eos_token_id


def test_a_tokenizer_can_be_taken_away_from_a_copy_alone(tower: Any) -> None:
    other = copy.copy(tower)
    other.tokenizer = None
    assert other.tokenizer is None
    assert tower.tokenizer is not None
    with pytest.raises(mm.InputError, match="no tokenizer"):
        other.to_tokens("abc")
    torch.testing.assert_close(other(TOKENS), tower(TOKENS), rtol=0, atol=0)
    again = copy.deepcopy(other._root)
    assert again.language.tokenizer is not None  # A copy of the tower is no part of the model.


def test_a_mask_of_another_shape_is_refused(tower: Any) -> None:
    with pytest.raises(mm.InputError, match="does not match the prompt shape"):
        tower.generate(TOKENS, attention_mask=torch.ones(2, 9, dtype=torch.long), **GREEDY)
    embeddings = tower.embed(TOKENS)
    with pytest.raises(mm.InputError, match="does not match the prompt shape"):
        tower.generate(embeddings, attention_mask=torch.ones(2, 5, dtype=torch.long), **GREEDY)


def test_a_side_of_padding_that_nothing_tells_is_refused(tower: Any) -> None:
    tower.tokenizer = None
    with pytest.raises(mm.InputError, match="this tower has none"):
        tower.generate(TOKENS, padding_side="left", stop_at_eos=False, **GREEDY)


def test_no_stop_strings_are_none(tower: Any) -> None:
    plain = tower.generate(TOKENS[:1], stop_at_eos=False, **GREEDY)
    assert torch.equal(tower.generate(TOKENS[:1], stop_at_eos=False, stop_strings=[], **GREEDY), plain)
    tower.tokenizer = None
    with pytest.raises(mm.InputError, match="needs a tokenizer"):
        tower.generate(TOKENS[:1], stop_at_eos=False, stop_strings="a", **GREEDY)


def test_criteria_are_checked(tower: Any) -> None:
    stopped = tower.generate(TOKENS, stop_at_eos=False, stopping_criteria=after(5), **GREEDY)
    whole = tower.generate(TOKENS, stop_at_eos=False, **GREEDY)
    assert torch.equal(stopped, whole[:, :5])
    with pytest.raises(mm.InputError, match="StoppingCriteria of transformers"):
        tower.generate(TOKENS, stopping_criteria=3, **GREEDY)
    with pytest.raises(mm.InputError, match="per-row bool"):
        tower.generate(TOKENS, stopping_criteria=lambda ids, scores, **_: torch.zeros(len(ids), 1), **GREEDY)


def test_rows_that_end_first_need_padding(tower: Any) -> None:
    tower.tokenizer = None
    with pytest.raises(mm.InputError, match="padding token"):
        tower.generate(TOKENS, stop_at_eos=False, stopping_criteria=after(5), **GREEDY)
    assert tower.generate(TOKENS[:1], stop_at_eos=False, stopping_criteria=after(5), **GREEDY).shape[1] == 5


def forwards(tower: Any) -> list[int]:
    """Counts the model's runs from now on."""
    runs: list[int] = []
    tower._root.wrapped.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "scalar output"),
        ({"return_type": "loss", "loss_per_token": True}, "scalar output"),
        ({"return_type": "loss", "stop_at_layer": 1}, "stop_at_layer"),
    ],
)
def test_a_backward_pass_goes_back_from_a_loss(tower: Any, options: dict[str, Any], says: str) -> None:
    runs = forwards(tower)
    with pytest.raises(mm.InputError, match=says):
        tower.run_with_cache(TOKENS, incl_bwd=True, **options)
    assert not runs


def test_a_backward_pass_needs_gradients(tower: Any) -> None:
    runs = forwards(tower)
    with torch.no_grad(), pytest.raises(mm.InputError, match="gradient tracking is off"):
        tower.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    tower.requires_grad_(False)
    with pytest.raises(mm.InputError, match="no grad_fn"):
        tower.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert not runs
    tower.add_hook("hook_embed", lambda value, hook: None)
    with pytest.raises(mm.InputError, match="no grad_fn"):
        tower.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    tower.reset_hooks()
    tower.requires_grad_(True)
    _, cache = tower.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    grad: Tensor = cache["blocks.0.hook_resid_pre_grad"]
    assert grad.abs().max() > 0


SWITCHES = {
    "use_attn_result": "blocks.1.attn.hook_result",
    "use_split_qkv_input": "blocks.1.hook_q_input",
    "use_attn_in": "blocks.1.hook_attn_in",
    "use_hook_mlp_in": "blocks.1.hook_mlp_in",
}


@pytest.mark.parametrize(("flag", "name"), SWITCHES.items())
def test_a_switch_of_the_configuration_is_the_towers(flag: str, name: str) -> None:
    both = pair()
    for model in (both.theirs, both.ours):
        setattr(model.cfg, flag, True)
    (_, want), (_, got) = (m.run_with_cache(TOKENS, names_filter=[name]) for m in (both.theirs, both.ours))
    torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    setattr(both.ours.cfg, flag, False)
    assert name not in both.ours.hook_dict
    for use in (
        lambda: both.ours.run_with_cache(TOKENS, names_filter=[name]),
        lambda: both.ours.add_hook(name, lambda value, hook: None),
        lambda: both.ours.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: None)]),
    ):
        with pytest.raises(mm.InputError, match=rf"set_{flag}\(True\)"):
            use()


def test_a_copy_of_a_configuration_switches_nothing() -> None:
    tower = pair().ours
    copied = copy.deepcopy(tower.cfg)
    copied.use_attn_result = True
    assert copied.use_attn_result
    assert not tower.cfg.use_attn_result
    assert "blocks.0.attn.hook_result" not in tower.hook_dict


@pytest.mark.parametrize("name", ["unembed.hook_in", "unembed.hook_out"])
def test_the_points_around_the_unembedding_are_hooked_transformers(name: str) -> None:
    both = pair()
    assert both.ours.run_with_cache(TOKENS)[1].keys() == both.theirs.run_with_cache(TOKENS)[1].keys()
    (_, want), (_, got) = (m.run_with_cache(TOKENS, names_filter=name) for m in (both.theirs, both.ours))
    torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    moved = [
        m.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda value, hook: 2 * value + 1)])
        for m in (both.theirs, both.ours)
    ]
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-5)
    assert not both.raw.lm_head._forward_hooks
    assert not both.raw.lm_head._forward_pre_hooks


def test_a_hook_at_the_unembedding_follows_another_module() -> None:
    tower, raw = pair().ours, pair().raw
    tower = mm.wrap(raw, tokenizer=tokenizer()).language
    tower.add_hook("unembed.hook_out", lambda value, hook: torch.zeros_like(value))
    assert not tower(TOKENS).any()
    raw.lm_head = copy.deepcopy(raw.lm_head)
    assert not tower(TOKENS).any()
    tower.reset_hooks()
    assert tower(TOKENS).any()
