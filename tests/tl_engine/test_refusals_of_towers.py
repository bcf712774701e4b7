"""What a tower does not take is named with its numbers; one step inside, it gives what the model gives."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import mm_adapters as mm
from mm_adapters import InputError
from mm_adapters._errors import HostAssertionError, HostMemberError
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tl_engine import generation, part_run, tower_call
from mm_adapters.tl_engine.derived_points import DerivedPoint
from mm_adapters.tl_engine.named_hooks import NamedPoint
from mm_adapters.tl_engine.tower_config import _rotary
from tests.hooked_opt import N_LAYERS, raw_opt, tokenizer

TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "verbose": False}


@cache
def opt() -> Any:
    return mm.wrap(raw_opt(), tokenizer=tokenizer()).language


@cache
def tower(family: str, name: str) -> Any:
    return mm.HookedModel(tiny.CASES[family]().model).tower(name)


def view(**members: Any) -> Any:
    """A TowerView with these members of its own, methods too."""
    return object.__new__(type("View", (TowerView,), members))


def refused(call: Callable[[], Any], says: str, error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=says):
        call()


# --- points -------------------------------------------------------------------


def test_a_cache_knows_a_name_with_and_without_its_towers() -> None:
    kept = opt().run_with_cache(TOKENS)[1]
    for name in ("blocks.0.hook_resid_post", "language.blocks.0.hook_resid_post"):
        assert name in kept
        assert torch.equal(kept[name], kept["resid_post", 0])
    assert "blocks.9.hook_resid_post" not in kept
    assert "vision.blocks.0.hook_resid_post" not in kept


def test_a_point_says_its_layer_or_that_it_has_none() -> None:
    points = opt()._root.points.by_name
    assert points["language.blocks.2.hook_resid_post"].layer() == 2
    refused(points["language.hook_embed"].layer, "^language.hook_embed belongs to no layer")
    assert DerivedPoint("blocks.1.x", 0, lambda: None).layer() == 0
    refused(DerivedPoint("sum", None, lambda: None).layer, "^sum belongs to no layer")


def test_a_point_under_another_name_can_be_copied() -> None:
    point = opt()._root.points.by_name["language.hook_embed"]
    copied = copy.copy(NamedPoint(point, "other"))
    assert copied.name == "other"
    assert copied.site is point.site
    with pytest.raises(AttributeError, match="gone"):
        _ = copied.gone
    with pytest.raises(AttributeError, match=r"^_point$"):
        NamedPoint.__new__(NamedPoint).name  # noqa: B018


def test_heads_inputs_are_edited_where_they_are_the_projections_own() -> None:
    ours = mm.wrap(raw_opt(), tokenizer=tokenizer()).language
    ours.set_use_split_qkv_input(True)
    inputs = ours._head_inputs[1]
    refused(
        lambda: inputs._hold(torch.zeros(2, 32)), r"^blocks.1 has \(2, 32\) at its input, not \[batch, pos"
    )
    stream = torch.zeros(2, 3, 32)
    assert inputs._hold(stream) is stream
    value = torch.full((1, 2, 4, 8), 2.0)
    inputs._check("q", value, value + 1e-5)
    # Off by up to 2 % of the largest, and a little for values that are zero.
    large = torch.zeros(1, 2, 4, 8)
    large[0, 0, 0, 0] = 100.0
    inputs._check("q", large + 1.9, large)
    refused(lambda: inputs._check("q", large + 2.1, large), "hook_q_input cannot be edited")
    inputs._check("q", large * 0 + 5e-5, large * 0)
    refused(lambda: inputs._check("q", large * 0 + 2e-4, large * 0), "hook_q_input cannot be edited")
    says = (
        r"^blocks.1.hook_k_input cannot be edited: this model's k is not.*Edit language.blocks.1.attn.hook_k"
    )
    refused(lambda: inputs._check("k", value, value + 0.1), says)
    refused(lambda: inputs._check("k", value, value[:, :1]), says)


# --- switches -------------------------------------------------------------------


def test_grouped_heads_have_no_one_input() -> None:
    grouped = tower("llama", "language")
    refused(
        lambda: grouped.set_use_attn_in(True), "heads share keys and values in groups.*use_split_qkv_input"
    )
    grouped.set_use_attn_in(False)
    says = "^The language tower computes 2 keys and values for 4 heads"
    refused(lambda: grouped.set_ungroup_grouped_query_attention(True), says)
    grouped.set_ungroup_grouped_query_attention(False)
    plain = opt()
    plain.set_ungroup_grouped_query_attention(True)
    plain.set_use_attn_in(True)
    assert plain.cfg.use_attn_in
    plain.set_use_attn_in(False)
    assert not plain.cfg.use_attn_in


def test_a_switch_needs_the_part_that_it_shows() -> None:
    convolutions = tower("resnet", "vision")
    refused(
        lambda: convolutions.set_use_attn_result(True),
        "has no attn.hook_result: its blocks have no attn.hook_z",
    )
    refused(
        lambda: convolutions.set_use_hook_mlp_in(True), "has no hook_mlp_in: its blocks have no mlp.hook_post"
    )
    convolutions.set_use_attn_result(False)
    assert not convolutions.cfg.use_attn_result


def test_an_mlp_behind_its_norm_is_given_the_stream_that_its_first_layer_is() -> None:
    """BERT's norms come after: what the MLP alone reads is its own first layer's input."""
    case = tiny.CASES["bert"]()
    text = mm.HookedModel(case.model).text
    text.set_use_hook_mlp_in(True)
    layer = next(m for n, m in case.model.named_modules() if n.endswith("layer.0.intermediate.dense"))
    given: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0].clone()))
    _, kept = text.run_with_cache(case.inputs["input_ids"])
    handle.remove()
    assert torch.equal(kept["blocks.0.hook_mlp_in"], given[0])
    handle = layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    want = text(case.inputs["input_ids"])
    handle.remove()
    hooks = [("blocks.0.hook_mlp_in", lambda value, hook: value * 2)]
    assert torch.equal(text.run_with_hooks(case.inputs["input_ids"], fwd_hooks=hooks), want)


def test_a_gated_mlp_behind_its_norm_has_no_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = mm.HookedModel(tiny.llama().model).language
    monkeypatch.setattr(gated, "_is_pre_norm", lambda layer: False)
    refused(
        lambda: gated.set_use_hook_mlp_in(True), "language.blocks.0.hook_mlp_in: this MLP has no one input"
    )
    gated.set_use_hook_mlp_in(False)


def test_weights_are_folded_where_a_norm_comes_before_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    says = "^The text tower is no stack of attentions and MLPs with a norm before each"
    refused(lambda: tower("bert", "text").folded, says)
    ours = mm.wrap(raw_opt(), tokenizer=tokenizer()).language
    assert ours.folded.W_Q.shape[0] == N_LAYERS
    with monkeypatch.context() as one:
        one.setattr(type(ours), "_is_pre_norm", lambda tower, layer: layer != 1)
        refused(lambda: ours.folded, "^The language tower is no stack")
    ours.cfg.__dict__["attn_only"] = True
    refused(lambda: ours.folded, "^The language tower is no stack")


# --- generating -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "continues a text, a list of texts, tokens or embeddings"),
        ([3, 4], "continues a text"),
        ([], "continues a text"),
        (["a", 3], "continues a text"),
        (torch.zeros(1, 1, 1, 32), "continues a text"),
        (torch.zeros(1, 0, dtype=torch.long), "was given no tokens to continue"),
        (torch.zeros(0, 3, dtype=torch.long), "was given no tokens to continue"),
    ],
)
def test_what_is_no_prompt_is_not_continued(given: Any, says: str) -> None:
    refused(lambda: opt().generate(given, **GREEDY), f"^generate {says}")


def test_texts_tokens_and_embeddings_are_continued_alike() -> None:
    ours = opt()
    tokens = ours.to_tokens("abc")
    want = ours.generate("abc", return_type="tokens", **GREEDY)
    assert torch.equal(ours.generate(("abc",), return_type="tokens", **GREEDY), want)
    assert torch.equal(ours.generate(tokens[0], **GREEDY), want)
    new = ours.generate(ours.embed(tokens), return_type="tokens", **GREEDY)
    assert torch.equal(new, want[:, tokens.shape[1] :])


def test_what_goes_with_tokens_alone_is_refused_for_embeddings() -> None:
    ours = opt()
    stream = ours.embed(TOKENS)
    refused(lambda: ours.generate(stream, return_cache=True, **GREEDY), "^return_cache takes text or tokens")
    refused(lambda: next(ours.generate_stream(stream, **GREEDY)), "^generate_stream continues text or tokens")
    sampled = {**GREEDY, "do_sample": True, "freq_penalty": 1.0}
    refused(
        lambda: ours.generate(stream, **sampled), "^freq_penalty counts tokens, and embeddings were given"
    )
    assert ours.generate(stream, **{**sampled, "freq_penalty": 0.0}).shape[0] == 2
    assert ours.generate(stream, **{**GREEDY, "freq_penalty": 1.0}).shape[0] == 2  # Nothing is drawn.


def test_a_frequency_penalty_is_taken_off_once_for_each_time() -> None:
    penalty = generation._FrequencyPenalty(0.5)
    scores = penalty(torch.tensor([[1, 1, 2], [0, 2, 2]]), torch.ones(2, 4))
    assert scores.tolist() == [[1, 0, 0.5, 1], [0.5, 1, 0, 1]]


def test_a_model_that_writes_nothing_generates_nothing() -> None:
    vision = tower("clip_vision", "vision")
    refused(
        lambda: vision.generate("a", **GREEDY),
        "^The vision tower generates nothing: its model has no generate",
    )


def test_an_end_token_is_the_one_given_or_the_tokenizers_or_the_models() -> None:
    ours = mm.wrap(raw_opt(), tokenizer=tokenizer()).language
    free = ours.generate(TOKENS, stop_at_eos=False, **GREEDY)
    end = int(free[0, 4])
    ended = ours.generate(TOKENS[:1], eos_token_id=end, **GREEDY)
    assert ended.tolist() == free[:1, :5].tolist()
    ours.tokenizer = SimpleNamespace(
        eos_token_id=None, pad_token_id=None, padding_side="right", pad_token="p"
    )
    ours._root.wrapped.generation_config.eos_token_id = end
    assert ours.generate(TOKENS[:1], **GREEDY).tolist() == free[:1, :5].tolist()
    ours._root.wrapped.generation_config.eos_token_id = None
    says = "^stop_at_eos needs an end token, and the tokenizer has none: pass eos_token_id="
    refused(lambda: ours.generate(TOKENS[:1], **GREEDY), says)
    assert torch.equal(ours.generate(TOKENS, stop_at_eos=False, **GREEDY), free)


def test_the_models_own_generate_gives_text_or_tokens() -> None:
    ours = opt()
    own = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    tokens = ours.to_tokens("abc")
    want = ours._root.wrapped.generate(tokens, attention_mask=torch.ones_like(tokens), **own)
    text = ours.tokenizer.decode(want[0], skip_special_tokens=True)
    assert ours.hf_generate("abc", **own) == text
    assert ours.hf_generate(tokens, return_type="str", **own) == text
    assert torch.equal(ours.hf_generate(tokens, **own), want)
    assert torch.equal(ours.hf_generate("abc", return_type="tokens", **own), want)
    whole = ours.hf_generate("abc", return_dict_in_generate=True, **own)
    assert torch.equal(whole.sequences, want)
    for wrong in ("embeds", None, "text"):
        says = f"^return_type={wrong!r} is none of 'str', 'tokens', 'input'"
        refused(lambda wrong=wrong: ours.hf_generate("abc", return_type=wrong, **own), says)


def test_without_a_tokenizer_there_are_no_texts() -> None:
    bare = mm.wrap(raw_opt()).language
    says = "^Without a tokenizer there are no texts: return_type='tokens'"
    refused(lambda: bare.generate(TOKENS, return_type="str", **GREEDY), says, HostAssertionError)
    assert bare.generate(TOKENS, **GREEDY).shape[0] == 2


def test_a_bar_goes_on_by_one_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.n, self.closed = options, 0, False
            bars.append(self)

        def update(self, n: int = 1) -> None:
            self.n += n

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(generation, "tqdm", Bar)
    shown = opt().generate(TOKENS[:1], **{**GREEDY, "verbose": True, "stop_at_eos": False})
    assert [(b.options, b.n, b.closed) for b in bars] == [({"total": 3}, 3, True)]
    assert torch.equal(shown, opt().generate(TOKENS[:1], stop_at_eos=False, **GREEDY))
    assert len(bars) == 1
    generation._Bar(3).end()  # Nothing came.


# --- key-value caches -------------------------------------------------------------------


def held(n_layers: int, rows: int, length: int = 0) -> Any:
    cfg = SimpleNamespace(n_layers=n_layers, n_heads=4, d_head=8, device="cpu", dtype=torch.float32)
    cfg.n_key_value_heads = None
    made = TransformerLensKeyValueCache.init_cache(cfg, "cpu", rows)  # type: ignore[arg-type]
    for entry in made.entries if length else ():
        entry.past_keys = entry.past_values = torch.zeros(rows, length, 4, 8)
    return made


def test_a_cache_has_the_towers_layers_and_the_calls_rows() -> None:
    ours = opt()
    run = lambda cache: ours(TOKENS, past_kv_cache=cache)  # noqa: E731
    refused(lambda: run({}), "^past_kv_cache is a dict: pass TransformerLensKeyValueCache.init_cache")
    refused(lambda: run(SimpleNamespace(entries=[])), "^past_kv_cache is a SimpleNamespace")
    refused(
        lambda: run(held(N_LAYERS + 1, 2)), f"^past_kv_cache has 4 layers; the language tower has {N_LAYERS}"
    )
    refused(lambda: run(held(N_LAYERS, 3)), "^past_kv_cache is of 3 rows, and 2 were given")
    torch.testing.assert_close(run(held(N_LAYERS, 2)), ours(TOKENS))


@pytest.mark.parametrize(
    ("family", "name"), [("mllama", "vision"), ("clip_vision", "vision"), ("t5_encoder", "text")]
)
def test_a_tower_that_keeps_no_keys_takes_no_cache(family: str, name: str) -> None:
    found = tower(family, name)
    names = found._root.call_names()
    names = names if family != "mllama" else tower_call.tower_names("x", found._mounted.module)
    says = f"^The {name} tower takes no past_kv_cache: it does not keep"
    made = tower_call.key_value_cache(held(1, 1), names, found._mounted, None)
    with pytest.raises(InputError, match=says), made:
        pass


def test_a_cache_says_how_many_positions_came_before() -> None:
    ours = opt()
    assert ours.get_pos_offset(None, 2) == 0
    assert ours.get_pos_offset(held(N_LAYERS, 2, 5), 2) == 5
    refused(lambda: ours.get_pos_offset(held(N_LAYERS, 3, 5), 2), "^past_kv_cache is of 3 rows, not 2")


def test_a_mode_that_processes_weights_is_refused() -> None:
    ours = opt()
    says = "^enable_compatibility_mode processes weights: .*With no_processing=True there is nothing to do"
    refused(ours.enable_compatibility_mode, says, HostMemberError)
    assert ours.enable_compatibility_mode(no_processing=True) is None


# --- part of a run -------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["1", 1.0, None, True, [1]])
def test_a_layer_is_a_number(layer: Any) -> None:
    says = rf"^stop_at_layer={re.escape(repr(layer))}: it is the number of a layer"
    refused(lambda: part_run.layer_number(opt()._mounted, layer, "stop_at_layer"), says)


def test_layers_are_counted_as_a_slice_counts_them() -> None:
    number = lambda layer: part_run.layer_number(opt()._mounted, layer, "x")  # noqa: E731
    assert [number(n) for n in (0, 1, 3, 9, -1, -3, -9)] == [0, 1, 3, 3, 2, 0, 0]


@pytest.mark.parametrize(("family", "stacks"), [("mllama", "blocks, global_blocks"), ("qwen2_vl", "none")])
def test_a_tower_of_other_stacks_has_no_part_runs(family: str, stacks: str) -> None:
    name = "vision" if family == "mllama" else "projector"
    mounted = view(
        name=name,
        stacks=tower(family, name)._mounted.stacks,
        check_one_stream=lambda self: None,
        n_layers=lambda self: 1,
    )
    says = f"^The {name} tower takes no start_at_layer: its stacks are {stacks}, not blocks alone"
    refused(lambda: part_run.layer_number(mounted, 0, "start_at_layer"), says)


def test_blocks_that_are_passed_over_get_their_own_forward_back() -> None:
    stream, other = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    blocks = [nn.Module(), nn.Module()]
    first = lambda x, extra: (None, x + extra, "kept")  # noqa: E731
    second = lambda x: x  # noqa: E731
    blocks[0].__dict__["forward"], blocks[1].__dict__["forward"] = first, second
    with part_run._skipped(blocks, other):
        assert blocks[0].forward(stream, 1) == (None, other, "kept")
        assert blocks[1].forward(stream) == (None, other, "kept")
    assert blocks[0].__dict__["forward"] is first
    assert blocks[1].__dict__["forward"] is second
    plain: list[nn.Module] = [nn.Identity(), nn.Identity()]
    with part_run._skipped(plain, other):
        assert torch.equal(plain[0](stream), other)
        assert torch.equal(plain[1](stream), other)
    assert "forward" not in plain[0].__dict__
    assert torch.equal(plain[0](stream), stream)


def test_a_stream_that_enters_is_like_the_one_that_is_there() -> None:
    half = part_run._like(torch.zeros(1, 2, 3, dtype=torch.float16), torch.ones(1, 2, 3))
    assert half.dtype == torch.float16
    says = r"start_at_layer was given a stream of \(1, 2, 3\); here it is \(1, 2, 4\)"
    refused(lambda: part_run._like(torch.zeros(1, 2, 4), torch.ones(1, 2, 3)), says)


def test_what_a_part_run_does_not_take() -> None:
    ours, vision = opt(), tower("clip_vision", "vision")
    stream = ours.run_with_cache(TOKENS)[1]["resid_pre", 1]
    at = lambda value, **more: ours(value, **{"start_at_layer": 1, **more})  # noqa: E731
    for wrong in (TOKENS, stream[0], stream.long(), stream[None], "text"):
        refused(
            lambda wrong=wrong: at(wrong), r"^start_at_layer takes the stream that enters the layer, \[batch"
        )
    says = "^past_kv_cache goes with start_at_layer=0 only"
    refused(lambda: at(stream, past_kv_cache=held(N_LAYERS, 2)), says)
    whole = ours(TOKENS)
    torch.testing.assert_close(at(stream), whole)
    first = ours.run_with_cache(TOKENS)[1]["resid_pre", 0]
    torch.testing.assert_close(at(first, start_at_layer=0, past_kv_cache=held(N_LAYERS, 2)), whole)
    refused(lambda: at(stream, return_type="loss"), "^A loss is of tokens: with start_at_layer, pass tokens=")
    loss = at(stream, return_type="loss", tokens=TOKENS)
    torch.testing.assert_close(loss, ours(TOKENS, return_type="loss"))
    assert at(stream, stop_at_layer=1) is stream
    assert at(stream, stop_at_layer=0) is stream
    assert at(stream, stop_at_layer=2) is not stream
    assert torch.equal(ours(TOKENS, stop_at_layer=0), first)
    refused(lambda: ours(TOKENS, shortformer_pos_embed=stream), "^shortformer_pos_embed: no model here adds")
    pixels = tiny.pixels()
    for kind in ("loss", "both"):
        refused(
            lambda kind=kind: vision(pixels, return_type=kind),
            "^The vision tower predicts no words, so it has no loss",
        )
    refused(lambda: ours(TOKENS, return_type="nothing"), "^return_type='nothing' is none of 'logits', 'loss'")
    says = "^The vision tower takes no attention_mask: it attends to everything"
    refused(lambda: vision(pixels, attention_mask=torch.ones(2, 5, dtype=torch.long)), says)


def test_a_text_towers_part_run_reads_its_summary_at_its_end_token() -> None:
    case, text = tiny.clip_text(), tower("clip_text", "text")
    ids = case.inputs["input_ids"]
    stream = text.run_with_cache(ids)[1]["resid_pre", 1]
    refused(
        lambda: text(stream, start_at_layer=1),
        "^The text tower reads its summary at its end token: pass tokens=",
    )
    torch.testing.assert_close(text(stream, start_at_layer=1, tokens=ids), text(ids))


def test_a_vision_towers_part_run_needs_the_size_of_its_images() -> None:
    vision = mm.HookedModel(tiny.clip_vision().model).vision
    pixels = tiny.pixels()
    stream = vision.run_with_cache(pixels)[1]["resid_pre", 1]
    torch.testing.assert_close(vision(stream, start_at_layer=1), vision(pixels))
    want = vision(pixels)
    with vision.given(pixel_values=pixels):  # Those that stand for it are blank, whatever was given.
        torch.testing.assert_close(vision(stream, start_at_layer=1), want)
        refused(lambda: vision(pixels), "^pixel_values was given twice: as what the tower is run on, and as")


@pytest.mark.parametrize(
    ("size", "shape"), [(4, (2, 3, 4, 4)), ((4, 6), (2, 3, 4, 6)), ([6, 4], (2, 3, 6, 4))]
)
def test_blank_pixels_are_of_the_towers_size(size: Any, shape: Any) -> None:
    root = SimpleNamespace(device="cpu", dtype=torch.float64)
    config = SimpleNamespace(image_size=size)
    vision = {"name": "vision", "input_name": "pixel_values", "module": SimpleNamespace(config=config)}
    blank = tower_call._blank(view(**vision), 2, root)
    assert (tuple(blank.shape), blank.dtype, bool(blank.any())) == (shape, torch.float64, False)
    config.num_channels = 1
    assert tower_call._blank(view(**vision), 2, root).shape[1] == 1
    says = "^The vision tower does not say the size of its images: start_at_layer needs it"
    refused(lambda: tower_call._blank(view(**{**vision, "input_name": "patches"}), 2, root), says)
    config.image_size = None
    refused(lambda: tower_call._blank(view(**vision), 2, root), says)


# --- tokens and weights -------------------------------------------------------------------


def test_a_side_of_padding_is_left_or_right() -> None:
    ours = opt()
    assert (ours.pads_left("left"), ours.pads_left("right"), ours.pads_left(None)) == (True, False, False)
    refused(lambda: ours.pads_left("top"), "^padding_side='top': it is 'left', 'right' or None")


def test_strings_of_tokens_are_those_of_one_row() -> None:
    ours = opt()
    assert ours.to_str_tokens(torch.tensor([[3, 4]])) == ["b", "c"]
    assert ours.to_str_tokens([3, 4]) == ["b", "c"]
    refused(lambda: ours.to_str_tokens(TOKENS), r"^to_str_tokens takes one row of tokens, not \(2, 4\)")


def test_a_tokenizers_own_end_is_taken_off_a_text() -> None:
    ours = mm.wrap(raw_opt(), tokenizer=tokenizer()).language
    plain = ours.to_tokens("ab<|endoftext|>", prepend_bos=False).tolist()
    assert plain == [[2, 3, 0]]
    ours.cfg.__dict__["tokenizer_appends_eos"] = True
    assert ours.to_tokens("ab<|endoftext|><|endoftext|>", prepend_bos=False).tolist() == [[2, 3]]
    assert ours.to_tokens("<|endoftext|>ab", prepend_bos=False).tolist() == [[0, 2, 3]]
    assert ours.to_tokens("<|endoftext|>", prepend_bos=True).tolist() == [[0]]


def test_composition_is_by_q_k_or_v() -> None:
    ours = opt()
    refused(lambda: ours.all_composition_scores("O"), "^mode='O': mode must be one of 'Q', 'K' and 'V'")
    ov, later = ours.W_V[0, 1] @ ours.W_O[0, 1], ours.W_V[2, 3] @ ours.W_O[2, 3]
    want = (ov @ later).norm() / (ov.norm() * later.norm())
    torch.testing.assert_close(ours.all_composition_scores("V")[0, 1, 2, 3], want)


def test_a_tower_without_classes_has_no_unembedding() -> None:
    vision = mm.HookedModel(tiny.clip().model).vision
    refused(lambda: vision.W_U, "^The vision tower has no classes yet, so no unembedding")
    directions = torch.eye(2, 16) * 3
    vision.set_classes(["a cat", "a dog"], directions)
    torch.testing.assert_close(vision.W_U, vision.projection[:, :2])
    assert (vision.to_single_token("a cat"), vision.to_single_token("a dog")) == (0, 1)
    refused(lambda: vision.to_single_token("a cow"), "^No class 'a cow'; there is 'a cat', 'a dog'")


def test_another_module_leaves_classes_and_switches_as_they_were() -> None:
    model = mm.HookedModel(tiny.clip().model)
    vision, pixels = model.vision, tiny.pixels()
    vision.set_classes(["a cat", "a dog", "a cow"], torch.eye(3, 16))
    vision.set_use_attn_result(True)
    attention = model.wrapped.vision_model.encoder.layers[1].self_attn
    attention.out_proj = copy.deepcopy(attention.out_proj)
    with torch.no_grad():
        attention.out_proj.weight.mul_(2)
    kept = vision.run_with_cache(pixels)[1]
    assert (vision.cfg.d_vocab_out, vision.cfg.d_vocab) == (3, 3)
    result, out = kept["blocks.1.attn.hook_result"], kept["blocks.1.hook_attn_out"]
    torch.testing.assert_close(result.sum(2) + attention.out_proj.bias, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rope", "more"),
    [
        ({"rope_type": "default", "factor": 3.0}, {}),
        ({"rope_type": "linear", "factor": 2.0}, {"rotary_scaling_factor": 2.0}),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            {"rotary_scaling_factor": 2.0, "use_dynamic_ntk_rope": True},
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": None},
            {"yarn_factor": 4.0, "yarn_beta_fast": 32, "use_yarn_rope": True},
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            {"NTK_by_parts_factor": 8.0, "NTK_by_parts_low_freq_factor": 1.0, "use_NTK_by_parts_rope": True},
        ),
    ],
)
def test_a_rotations_scaling_is_told_in_transformer_lens_words(rope: dict[str, Any], more: Any) -> None:
    told = _rotary(SimpleNamespace(rope_parameters={"rope_theta": 500.0, **rope}), 8)
    assert told == {"rotary_base": 500.0, "rotary_dim": 8, **more}
    both = {"full_attention": {"rope_theta": 500.0, **rope}, "sliding_attention": {"rope_theta": 9.0}}
    settings = SimpleNamespace(rope_parameters=both, partial_rotary_factor=0.5)
    assert _rotary(settings, 8) == {"rotary_base": 500.0, "rotary_dim": 4, "rotary_base_local": 9.0, **more}
