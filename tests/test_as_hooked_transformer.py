"""A tower beside HookedTransformer on the same weights: every option gives the same numbers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache, patching
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import mm_adapters as mm
from tests.hooked_opt import N_LAYERS, Pair, pair

pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.*:DeprecationWarning")
TEXT, TEXTS = "abc de fgh", ["abc", "d efg hij"]


pair_of = cache(pair)


def both(side: str = "right") -> Pair:
    return pair_of(side)


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(2, 28, (rows, length), generator=torch.Generator().manual_seed(5))


def stream(layer: int) -> Tensor:
    return both().theirs.run_with_cache(tokens())[1]["resid_pre", layer]


def same(call: Callable[[Any], Any], side: str = "right", rtol: float = 1e-4, atol: float = 1e-5) -> None:
    theirs, ours = both(side).theirs, both(side).ours
    want, got = call(theirs), call(ours)
    assert type(got) is type(want) or isinstance(got, Tensor | tuple)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


FORWARDS: dict[str, Callable[[Any], Any]] = {
    "text": lambda m: m(TEXT),
    "one row of tokens": lambda m: m(tokens()[0]),
    "loss": lambda m: m(tokens(), return_type="loss"),
    "both": lambda m: tuple(m(tokens(), return_type="both")),
    "loss per token": lambda m: m(tokens(), return_type="loss", loss_per_token=True),
    "no BOS": lambda m: m(TEXT, prepend_bos=False),
    "padded right": lambda m: m(TEXTS, padding_side="right")[:, :4],
    "loss of masked tokens": lambda m: m(
        tokens(), return_type="loss", attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    ),
    "loss per masked token": lambda m: m(
        tokens(), return_type="loss", loss_per_token=True,
        attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
    )[:, 2:],
    **{f"stop at {n}": lambda m, n=n: m(tokens(), stop_at_layer=n) for n in (0, 1, N_LAYERS, -1)},
    **{f"start at {n}": lambda m, n=n: m(stream(n), start_at_layer=n) for n in (0, 1, 2)},
    "start from the end": lambda m: m(stream(N_LAYERS - 1), start_at_layer=-1),
    "start and stop": lambda m: m(stream(1), start_at_layer=1, stop_at_layer=2),
    "start, and a loss": lambda m: m(stream(1), start_at_layer=1, tokens=tokens(), return_type="loss"),
    "unembed(ln_final(x))": lambda m: m.unembed(m.ln_final(stream(2))),
    "embed": lambda m: m.embed(tokens()),
    "pos_embed": lambda m: m.pos_embed(tokens()),
    "pos_embed of padding": lambda m: m.pos_embed(
        tokens(), 0, torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    ),
    "ln1": lambda m: m.blocks[1].ln1(torch.arange(64.0).reshape(1, 2, 32)) @ m.W_Q[1, 0],
    "QK of a block": lambda m: m.blocks[1].attn.QK.AB,
    "OV of a block": lambda m: m.blocks[1].attn.OV.AB,
    "composition": lambda m: torch.stack([m.all_composition_scores(k) for k in "QKV"]),
    "W_E_pos": lambda m: m.W_E_pos,
    "loss_fn": lambda m: m.loss_fn(m(tokens()), tokens(), per_token=True),
}  # fmt: skip


@pytest.mark.parametrize("call", FORWARDS.values(), ids=FORWARDS)
def test_a_call_gives_what_hooked_transformer_gives(call: Callable[[Any], Any]) -> None:
    with torch.no_grad():
        same(call)


def test_texts_are_padded_left_where_the_tokenizer_does() -> None:
    with torch.no_grad():
        same(lambda m: m(TEXTS)[:, -4:], side="left")
        same(lambda m: m(m.to_tokens(TEXTS))[:, -4:], side="left")
        same(lambda m: m(TEXTS, return_type="loss"), side="left")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_run_goes_on_from_a_key_value_cache(frozen: bool, side: str) -> None:
    def in_two(model: Any) -> Tensor:
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        model(tokens()[:, :3], past_kv_cache=cache)
        if frozen:
            cache.freeze()
        second = model(tokens()[:, 3:6], past_kv_cache=cache)
        third = model(tokens()[:, 3:6] if frozen else tokens()[:, 6:], past_kv_cache=cache)
        assert cache.previous_attention_mask.shape[1] == (3 if frozen else 7)
        return torch.cat([second, third, cache[1].past_keys.flatten(2)[..., :28]], 1)

    with torch.no_grad():
        same(in_two, side)


def test_what_a_cache_of_a_part_run_holds() -> None:
    ours, theirs = both().ours, both().theirs
    for options, given in (({"stop_at_layer": 1}, tokens()), ({"start_at_layer": 2}, stream(2))):
        (_, got), (_, want) = (m.run_with_cache(given, **options) for m in (ours, theirs))
        shared = {k for k in want if k in both().ours.hook_dict}
        assert shared == set(got), set(got) ^ shared
        for name in shared:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_a_hook_acts_in_a_part_run_and_leaves_nothing_behind() -> None:
    def halved(value: Tensor, hook: Any) -> Tensor:
        return value / 2

    hooks = [("blocks.1.hook_resid_post", halved)]
    with torch.no_grad():
        plain = both().ours(tokens())
        same(lambda m: m.run_with_hooks(tokens(), fwd_hooks=hooks, stop_at_layer=2))
        same(lambda m: m.run_with_hooks(stream(1), fwd_hooks=hooks, start_at_layer=1))
        assert torch.equal(both().ours(tokens()), plain)
    with pytest.raises(mm.ReadNeverFiredError):
        both().ours.run_with_hooks(stream(2), fwd_hooks=hooks, start_at_layer=2)
    with pytest.raises(mm.InputError, match=r"start_at_layer was given a stream of \(2, 7, 3\)"):
        both().ours(torch.zeros(2, 7, 3), start_at_layer=1)
    assert "forward" not in both().raw.model.decoder.layers[0].__dict__


# -- Points that are asked for ----------------------------------------------------------------------

SWITCHES = {
    "set_use_attn_result": ["attn.hook_result"],
    "set_use_split_qkv_input": ["hook_q_input", "hook_k_input", "hook_v_input"],
    "set_use_attn_in": ["hook_attn_in"],
    "set_use_hook_mlp_in": ["hook_mlp_in"],
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_points_that_are_asked_for_hold_and_carry_what_theirs_do(switch: str) -> None:
    theirs, ours = both().theirs, both().ours
    names = [f"blocks.{layer}.{local}" for layer in range(N_LAYERS) for local in SWITCHES[switch]]
    with pytest.raises(mm.InputError, match=switch):
        ours.run_with_cache(tokens(), names_filter=names)
    for model in (theirs, ours):
        getattr(model, switch)(True)
    try:
        (logits, got), (_, want) = (m.run_with_cache(tokens(), names_filter=names) for m in (ours, theirs))
        torch.testing.assert_close(logits, theirs(tokens()), rtol=1e-4, atol=1e-5)
        assert set(got) == set(names)
        for name in names:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)

        def moved(value: Tensor, hook: Any) -> Tensor:
            return value.index_fill(-2 if value.ndim == 4 else 1, torch.tensor([1]), 0.3)

        def in_place(value: Tensor, hook: Any) -> Tensor:
            value[:, 2] = 0.7
            return value

        for name in names:
            for hook in (moved, in_place):
                run = partial(lambda m, h: m.run_with_hooks(tokens(), fwd_hooks=h), h=[(name, hook)])
                with torch.no_grad():
                    same(run, rtol=1e-3, atol=1e-4)
        same(partial(gradients, names=names))
    finally:
        for model in (theirs, ours):
            getattr(model, switch)(False)
    assert not set(names) & ours.hook_dict.keys()
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-4, atol=1e-5)


def gradients(model: Any, names: list[str]) -> list[Tensor]:
    _, cache = model.run_with_cache(
        tokens(), return_type="loss", incl_bwd=True, names_filter=lambda n: n in names
    )
    model.zero_grad()
    return [cache[f"{name}_grad"] for name in names]


def test_a_head_is_patched_through_one_later_heads_query_alone() -> None:
    """Path patching: what head 0.1 writes is taken out of what head 2.3's query reads."""

    def patched(model: Any) -> Tensor:
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        try:
            _, cache = model.run_with_cache(tokens())
            written = cache["result", 0][:, :, 1]

            def hook(value: Tensor, hook: Any) -> Tensor:
                value[:, :, 3] = value[:, :, 3] - written
                return value

            return model.run_with_hooks(tokens(), fwd_hooks=[("blocks.2.hook_q_input", hook)])
        finally:
            model.set_use_attn_result(False)
            model.set_use_split_qkv_input(False)

    with torch.no_grad():
        same(patched)
        assert not torch.allclose(patched(both().ours), both().ours(tokens()), atol=1e-3)


def test_grouped_heads_inputs_move_their_own_group() -> None:
    """Against the definition: the key of group 1 from an edited stream, all else as it was."""
    model: Any = mm.load("tiny-llava").language
    layer, group = 1, 0
    model.set_use_split_qkv_input(True)
    try:
        ids = model.to_tokens("a red circle")
        name = f"blocks.{layer}.hook_k_input"

        def hook(value: Tensor, hook: Any) -> Tensor:
            value[:, :, group] *= 2.0
            value[:, :, group, 0] += 1.0
            return value

        with torch.no_grad():
            _, plain = model.run_with_cache(ids)
            seen: dict[str, Tensor] = {}
            keep = (f"blocks.{layer}.attn.hook_k", lambda value, hook: seen.update(k=value.clone()))
            model.run_with_hooks(ids, fwd_hooks=[(name, hook), keep])
            x = plain["resid_pre", layer] * 2
            x[..., 0] += 1
            normed = model.blocks[layer].ln1.stands_for[0](x)
            repeats = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
            want = plain["k", layer].clone()
            want[:, :, group] = normed @ model.W_K[layer, group * repeats] + model.b_K[layer, group * repeats]
        torch.testing.assert_close(seen["k"], want, rtol=1e-4, atol=1e-4)
    finally:
        model.set_use_split_qkv_input(False)


# -- Generating ------------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
GENERATIONS: dict[str, Callable[[Any], Any]] = {
    "text": lambda m: m.generate(TEXT, **GREEDY),
    "texts": lambda m: m.generate(TEXTS, **GREEDY),
    "tokens": lambda m: m.generate(tokens(), **GREEDY),
    "texts as tokens": lambda m: m.generate(TEXTS, return_type="tokens", **GREEDY),
    "tokens as text": lambda m: m.generate(tokens(), return_type="str", **GREEDY),
    "without a cache": lambda m: m.generate(tokens(), use_past_kv_cache=False, **GREEDY),
    "past the end token": lambda m: m.generate(tokens(), stop_at_eos=False, **GREEDY),
    "another end token": lambda m: m.generate(tokens(), eos_token_id=[3, 12, 20], **GREEDY),
    "no BOS": lambda m: m.generate(TEXT, prepend_bos=False, return_type="tokens", **GREEDY),
    "logits": lambda m: torch.stack(m.generate(tokens(), output_logits=True, **GREEDY).logits),
    # With its cache HookedTransformer counts the positions of embeddings twice.
    "embeddings": lambda m: m.generate(
        m.embed(tokens()), return_type="tokens", use_past_kv_cache=False, **GREEDY
    ),
    "embeddings out": lambda m: m.generate(m.embed(tokens()), use_past_kv_cache=False, **GREEDY),
    "stream": lambda m: list(m.generate_stream(tokens(), max_tokens_per_yield=3, **GREEDY)),
    "stream of a text": lambda m: list(m.generate_stream(TEXT, max_tokens_per_yield=4, **GREEDY)),
}


@pytest.mark.parametrize("call", GENERATIONS.values(), ids=GENERATIONS)
def test_a_generation_gives_what_hooked_transformers_gives(call: Callable[[Any], Any]) -> None:
    want, got = call(both().theirs), call(both().ours)
    if isinstance(want, str) or (isinstance(want, list) and isinstance(want[0], str)):
        assert got == want
    else:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"temperature": 0.0},
                {"freq_penalty": 2.0, "temperature": 0.7}, {"top_k": 5, "temperature": 2.0}],
)  # fmt: skip
def test_sampling_draws_the_same_tokens_from_the_same_seed(options: dict[str, Any]) -> None:
    def drawn(model: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(
            tokens(), max_new_tokens=12, do_sample=True, stop_at_eos=False, verbose=False, **options
        )

    assert drawn(both().ours).tolist() == drawn(both().theirs).tolist()


def test_generate_returns_what_else_is_asked_for() -> None:
    ours = both().ours
    text, cache, given = ours.generate(TEXT, return_cache=True, return_input_tokens=True, **GREEDY)
    assert torch.equal(given, ours.to_tokens(TEXT))
    tokens_out = ours.generate(TEXT, return_type="tokens", **GREEDY)
    assert ours.tokenizer.decode(tokens_out[0], skip_special_tokens=True) == text
    want = ours.run_with_cache(tokens_out)[1]
    torch.testing.assert_close(cache["resid_post", 1], want["resid_post", 1])


def test_a_row_stops_where_its_text_ends_with_a_string() -> None:
    ours = both().ours
    whole = ours.tokenizer.decode(
        ours.generate(TEXT, return_type="tokens", stop_at_eos=False, **GREEDY)[0, 1:]
    )
    end = whole[len(TEXT) + 1 : len(TEXT) + 3]
    stopped = ours.generate(TEXT, stop_strings=end, return_type="tokens", stop_at_eos=False, **GREEDY)
    assert ours.tokenizer.decode(stopped[0, 1:]).endswith(end)
    assert stopped.shape[1] < len(whole) + 1


def test_a_part_that_is_no_module_says_so() -> None:
    with pytest.raises(mm.InputError, match="mlp is no module of the model"):
        both().ours.blocks[1].mlp(torch.ones(1, 2, 32))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"return_type": "nonsense"}, "none of 'input'"), ({"max_new_tokens": 0}, "must be 1"),
     ({"temprature": 2.0}, "temperature")],
)  # fmt: skip
def test_a_generation_that_cannot_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(mm.InputError, match=says):
        both().ours.generate(TEXT, **{**GREEDY, **options})


# -- What a module does to itself -------------------------------------------------------------------


def test_a_tower_is_trained_by_an_optimizer() -> None:
    ours = copy.deepcopy(both().model).language
    before = ours(tokens(), return_type="loss")
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        ours(tokens(), return_type="loss").backward()
        optimizer.step()
    assert ours(tokens(), return_type="loss") < before - 0.3
    ours.zero_grad()
    assert all(p.grad is None for p in ours.parameters())
    torch.testing.assert_close(both().ours(tokens()), both().theirs(tokens()), rtol=1e-4, atol=1e-5)


def test_parameters_are_the_models_own_once_each() -> None:
    ours, raw = both().ours, both().raw
    assert {id(p) for p in ours.parameters()} == {id(p) for p in raw.parameters()}
    assert len(list(ours.parameters())) == len(list(raw.parameters()))
    assert ours.n_params_total == raw.num_parameters()
    assert dict(ours.named_parameters()).keys() == dict(raw.named_parameters()).keys()
    assert ours.cfg.n_params == both().theirs.cfg.n_params


def test_a_state_goes_out_and_in() -> None:
    ours = copy.deepcopy(both().model).language
    state = {k: torch.zeros_like(v) for k, v in ours.state_dict().items()}
    assert state.keys() == both().raw.state_dict().keys()
    ours.load_state_dict(state)
    assert not ours(tokens()).any()
    with pytest.raises(mm.InputError, match="is not the language tower's"):
        ours.load_state_dict({"nonsense": torch.zeros(1)})
    ours.load_state_dict(both().raw.state_dict())
    assert torch.equal(ours(tokens()), both().ours(tokens()))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_cast_is_the_models_own(cast: str) -> None:
    model = copy.deepcopy(both().model)
    raw = getattr(copy.deepcopy(both().raw), cast)()
    getattr(model.language, cast)()
    assert model.language.cfg.dtype == model.dtype == next(raw.parameters()).dtype
    with torch.no_grad():
        assert torch.equal(model.language(tokens()), raw(input_ids=tokens()).logits)


def test_one_tower_of_two_is_frozen_cast_and_put_into_training() -> None:
    model: Any = mm.load("tiny-clip")
    model.vision.requires_grad_(False)
    model.text.half()
    model.vision.train()
    modules = model.wrapped
    assert not any(p.requires_grad for p in modules.vision_model.parameters())
    assert all(p.requires_grad for p in modules.text_model.parameters())
    assert modules.text_projection.weight.dtype == model.text.W_Q.dtype == torch.float16
    assert modules.visual_projection.weight.dtype == model.vision.W_Q.dtype == torch.float32
    assert modules.vision_model.training
    assert not modules.text_model.training
    assert (model.text.cfg.dtype, model.vision.cfg.dtype) == (torch.float16, torch.float32)


# -- Copies ------------------------------------------------------------------------------------------


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_is_the_same_and_its_own(copied: Callable[[Any], Any]) -> None:
    model = both().model
    tower = copied(model.language)
    assert torch.equal(tower(tokens()), both().ours(tokens()))
    tower.W_E.data.zero_()
    assert tower.blocks[0].attn.W_Q.data_ptr() != both().ours.blocks[0].attn.W_Q.data_ptr()
    assert not tower.embed(tokens()).any()
    assert both().ours.embed(tokens()).any()


def test_a_copy_keeps_classes_switches_and_modes() -> None:
    model: Any = mm.load("tiny-clip")
    model.vision.set_classes(["a red circle", "a blue square"])
    model.vision.set_use_attn_result(True)
    model.text.train()
    twin = through_pickle(model)
    pixels = model.prepare(images=torch.rand(1, 3, 32, 32))["pixel_values"]
    assert torch.equal(twin.vision(pixels), model.vision(pixels))
    assert "blocks.0.attn.hook_result" in twin.vision.hook_dict
    assert twin.wrapped.text_model.training
    assert not twin.wrapped.vision_model.training


@pytest.mark.parametrize("whose", ["tower", "model"])
def test_a_cache_goes_through_a_pickle(whose: str) -> None:
    model = both().model
    of = model.language if whose == "tower" else model
    _, cache = of.run_with_cache(tokens())
    again: Any = through_pickle(cache)
    assert isinstance(again, ActivationCache)
    assert all(torch.equal(again[name], cache[name]) for name in cache)
    if whose == "tower":
        sums: list[Any] = [c.accumulated_resid() for c in (again, cache)]
        assert torch.equal(*sums)


def test_patching_tables_agree() -> None:
    clean, corrupted = tokens(1), tokens(1).flip(1)

    def table(model: Any) -> Tensor:
        _, cache = model.run_with_cache(clean)
        return patching.get_act_patch_attn_head_out_all_pos(
            model, corrupted, cache, lambda logits: logits[0, -1, 3]
        )

    with torch.no_grad():
        same(table)
