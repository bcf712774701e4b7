"""Every public member of TransformerLens' models is on a tower, or is refused with a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import mm_adapters as mm
from mm_adapters.tl_engine.host_members import REFUSED
from tests.hooked_opt import N_LAYERS, pair, tokenizer
from tests.hosts import transformer_lens_members

pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.*:DeprecationWarning")


@pytest.fixture(scope="module")
def opt() -> Any:
    return pair()


@pytest.mark.parametrize("host", ["HookedTransformer", "TransformerBridge"])
def test_a_tower_has_every_member_or_says_why_not(opt: Any, host: str) -> None:
    members = transformer_lens_members()[host]
    lacking = {name for name in members if not hasattr(opt.ours, name)}
    assert lacking <= REFUSED.keys(), "a new version of the host has more members: add or refuse them"


def test_what_is_refused_is_the_hosts_and_says_what_to_do(opt: Any) -> None:
    known = set().union(*transformer_lens_members().values(), vars(opt.theirs), opt.theirs._modules)
    known.add("hook_tokens")  # Theirs has it if its configuration asks for it.
    assert REFUSED.keys() <= known, "a host has lost a member: drop it here"
    for name, reason in REFUSED.items():
        assert not hasattr(opt.ours, name)
        with pytest.raises(mm.HostMemberError, match=f"A tower has no {name}: {reason[:20]}"):
            getattr(opt.ours, name)


def test_a_cache_has_every_member(opt: Any) -> None:
    _, cache = opt.ours.run_with_cache("abc")
    assert {n for n in transformer_lens_members()["ActivationCache"] if not hasattr(cache, n)} == set()


def test_a_configuration_has_every_attribute_and_their_values(opt: Any) -> None:
    theirs, ours = vars(opt.theirs.cfg), opt.ours.cfg
    differ = {n for n, value in theirs.items() if getattr(ours, n) != value}
    # Names of the model; how theirs was initialised; that OPT's unembedding is its embedding.
    said = {"model_name", "original_architecture", "tokenizer_name", "tie_word_embeddings"}
    assert differ - {"attn_scale"} == said | {"init_weights", "initializer_range"}
    assert ours.attn_scale == pytest.approx(theirs["attn_scale"])


def test_members_of_the_embedding_equal_theirs(opt: Any) -> None:
    ids = torch.tensor([[0, 5, 7, 9], [0, 3, 3, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    for mine, want in zip(opt.ours.input_to_embed(ids), opt.theirs.input_to_embed(ids), strict=True):
        assert mine is want is None or torch.allclose(mine, want, atol=1e-5)
    embedded = opt.theirs.embed(ids)
    for options in ({}, {"attention_mask": mask}, {"return_shortformer_pos_embed": False}):
        got, want = (m.get_residual(embedded, 0, **options) for m in (opt.ours, opt.theirs))
        if isinstance(want, tuple):
            assert got[1] is want[1] is None
            got, want = got[0], want[0]
        torch.testing.assert_close(got, want)


def test_folded_weights_are_what_hooked_transformer_makes_of_them() -> None:
    both = pair(seed=3)
    folded = both.ours.folded
    both.theirs.process_weights_()
    for name in (field.name for field in dataclasses.fields(folded) if field.name != "W_gate"):
        got, want = getattr(folded, name).detach(), getattr(both.theirs, name).detach()
        assert (got - want).abs().max() < 2e-5 * max(1.0, float(want.abs().max())), name
    # And the model has its own still.
    again = pair(seed=3)
    torch.testing.assert_close(both.ours.W_Q, again.theirs.W_Q)


def test_folded_weights_of_rms_norms_give_the_models_words() -> None:
    """By the definition: the folded unembedding of the normalised stream, up to one number for all words."""
    tower: Any = mm.load("tiny-llava").language
    logits, cache = tower.run_with_cache("a red circle")
    stream = cache["resid_post", tower.cfg.n_layers - 1]
    folded = tower.folded
    normalised = stream / stream.pow(2).mean(-1, keepdim=True).add(tower.cfg.eps).sqrt()
    got = (normalised @ folded.W_U + folded.b_U).log_softmax(-1)
    torch.testing.assert_close(got, logits.log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert folded.W_gate.shape == tower.W_gate.shape


def test_a_tokenizer_is_set_on_the_tower_alone(opt: Any) -> None:
    fresh = pair(seed=1)
    before = fresh.model.tokenizer_of("language")
    other = tokenizer("left")
    fresh.ours.set_tokenizer(other, default_padding_side="left")
    assert fresh.ours.tokenizer is other
    assert fresh.model.tokenizer_of("language") is before
    assert fresh.ours.to_tokens(["a", "abc"])[0, 0] == other.pad_token_id
    with pytest.raises(mm.InputError, match="is no tokenizer"):
        fresh.ours.set_tokenizer("gpt2")


def test_members_of_the_bridge_over_blocks(opt: Any) -> None:
    tower = opt.ours
    assert tower.original_model is opt.raw
    assert tower.layer_types() == ["attn+mlp"] * N_LAYERS
    assert [i for i, _ in tower.blocks_with("attn")] == tower.composition_layer_indices() == [0, 1, 2]
    assert tower.all_head_labels == tower.all_head_labels() == tower.attn_head_labels
    layers, stacked = tower.stack_params_for("mlp", "mlp.W_in")
    assert layers == [0, 1, 2]
    assert torch.equal(stacked, tower.W_in)
    assert torch.equal(tower.QK_for_attn_layers()[1].AB, tower.QK.AB)
    assert torch.equal(tower.OV_for_attn_layers()[1].AB, tower.OV.AB)
    assert "attn.hook_z" in tower.block_hooks(1)
    assert tower.get_hook_point("blocks.1.attn.hook_z") is tower.hook_dict["blocks.1.attn.hook_z"]
    assert tower.get_hook_point("nonsense") is None
    assert dict(tower.tl_named_parameters()).keys() == tower.get_params().keys()
    with pytest.raises(mm.InputError, match="No block of the language tower has 'ssm'"):
        tower.stack_params_for("ssm", "ssm.A")
