"""What works on a HookedTransformer works on a tower."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix, HookedRootModule, SVDInterpreter, patching
from transformer_lens.utilities import get_act_name

import mm_adapters as mm
from mm_adapters.tl_engine.tower import HookedTower
from mm_adapters.zoo import sample_images


@cache
def model(name: str) -> mm.HookedModel:
    return mm.HookedModel(tiny.CASES[name]().model)


def inputs(name: str) -> dict[str, Any]:
    return tiny.CASES[name]().inputs


@pytest.fixture
def vision() -> HookedTower:
    tower = model("clip").tower("vision")
    tower.set_classes(None)
    return tower


@pytest.fixture
def language() -> HookedTower:
    return model("llava").tower("language")


TOWERS = [
    ("clip", "vision"),
    ("clip", "text"),
    ("siglip", "vision"),
    ("open_clip", "vision"),
    ("open_clip", "text"),
    ("llava", "language"),
    ("llava_siglip_qwen", "language"),
]
each_tower = pytest.mark.parametrize(("family", "name"), TOWERS)


def tower_input(tower: HookedTower) -> Tensor:
    if tower._mounted.record.role == "vision":
        return tiny.pixels()
    if tower._mounted.record.classes[0].startswith("open_clip"):
        return inputs("open_clip")["text"]
    if tower._mounted.record.role == "text":
        return tiny.clip_text_ids()["input_ids"] if tower.cfg.n_ctx == 16 else inputs("siglip")["input_ids"]
    return torch.randint(3, 57, (2, 7), generator=torch.Generator().manual_seed(2))


# The members of TransformerLens 4's runtime-checkable protocols, which 3.9 does not have yet.
PROTOCOL = (
    "cfg",
    "run_with_cache",
    "run_with_hooks",
    "to_tokens",
    "blocks",
    "ln_final",
    "accumulated_bias",
    "to_single_token",
    "tokens_to_residual_directions",
)


@each_tower
def test_a_tower_has_every_member_of_transformer_lens_protocols(family: str, name: str) -> None:
    tower = model(family).tower(name)
    assert isinstance(tower, HookedRootModule)
    assert not [m for m in PROTOCOL if not hasattr(tower, m)]


@each_tower
@torch.no_grad()
def test_local_cache_holds_every_site_under_transformer_lens_names(family: str, name: str) -> None:
    tower = model(family).tower(name)
    _, found = tower.run_with_cache(tower_input(tower))
    assert isinstance(found, ActivationCache)
    assert set(found.keys()) == set(tower.hook_dict)
    for layer in range(tower.cfg.n_layers):
        for short in (
            "q",
            "k",
            "v",
            "z",
            "attn_scores",
            "pattern",
            "resid_pre",
            "resid_mid",
            "resid_post",
            "attn_out",
            "mlp_out",
            "pre",
            "post",
        ):
            assert found[short, layer] is found[get_act_name(short, layer)]
            assert found[f"{name}.{get_act_name(short, layer)}"] is found[short, layer]


@each_tower
@torch.no_grad()
def test_residual_stream_is_the_sum_of_its_components(family: str, name: str) -> None:
    tower = model(family).tower(name)
    _, found = tower.run_with_cache(tower_input(tower))
    parts, labels = found.decompose_resid(layer=-1, return_labels=True)
    final = found["resid_post", -1]
    start = found["resid_pre", 0]
    # A position table that is added without a module is in resid_pre and nowhere else.
    rest = start - parts[[i for i, label in enumerate(labels) if "embed" in label]].sum(0)
    if family != "open_clip" or name != "text":
        assert rest.abs().max() < 1e-6
    assert ((parts.sum(0) + rest - final).norm() / final.norm()) < 1e-5


@each_tower
@torch.no_grad()
def test_head_results_and_bias_sum_to_attention_output(family: str, name: str) -> None:
    tower = model(family).tower(name)
    _, found = tower.run_with_cache(tower_input(tower))
    found.compute_head_results()
    for layer in range(tower.cfg.n_layers):
        total = found["result", layer, "attn"].sum(-2) + tower.b_O[layer]
        assert (total - found["attn_out", layer]).norm() / found["attn_out", layer].norm() < 1e-5


@each_tower
@torch.no_grad()
def test_weights_reproduce_the_activations(family: str, name: str) -> None:
    tower = model(family).tower(name)
    _, found = tower.run_with_cache(tower_input(tower))
    heads, width, d_head = tower.cfg.n_heads, tower.cfg.d_model, tower.cfg.d_head
    assert tower.W_Q.shape == (tower.cfg.n_layers, heads, width, d_head)
    assert tower.W_O.shape == (tower.cfg.n_layers, heads, d_head, width)
    for layer in range(tower.cfg.n_layers):
        block: Any = tower.blocks[layer]
        seen = found[f"blocks.{layer}.ln1.hook_normalized"] * block.ln1.w + block.ln1.b
        for short, w, b in (
            ("q", tower.W_Q, tower.b_Q),
            ("k", tower.W_K, tower.b_K),
            ("v", tower.W_V, tower.b_V),
        ):
            made = torch.einsum("bnm,hmd->bnhd", seen, w[layer]) + b[layer]
            kept = found[short, layer]
            kept = kept.repeat_interleave(heads // kept.shape[2], 2)
            torch.testing.assert_close(made, kept, rtol=1e-4, atol=1e-5)
        read = found[f"blocks.{layer}.ln2.hook_normalized"] * block.ln2.w + block.ln2.b
        pre = found["pre_linear" if tower.cfg.gated_mlp else "pre", layer]
        torch.testing.assert_close(read @ tower.W_in[layer] + tower.b_in[layer], pre, rtol=1e-4, atol=1e-5)
        out = found["post", layer] @ tower.W_out[layer] + tower.b_out[layer]
        torch.testing.assert_close(out, found["mlp_out", layer], rtol=1e-4, atol=1e-5)
        assert tower.W_Q[layer].data_ptr() != 0
        assert torch.equal(block.attn.W_K, tower.W_K[layer])


def test_qk_and_ov_are_factored(vision: HookedTower) -> None:
    assert isinstance(vision.QK, FactoredMatrix)
    torch.testing.assert_close(vision.OV.AB[1, 2], vision.W_V[1, 2] @ vision.W_O[1, 2])


def test_svd_interpreter_reads_a_tower(vision: HookedTower) -> None:
    vision.set_classes(["a", "b", "c"], torch.eye(16)[:3])
    found = SVDInterpreter(vision).get_singular_vectors("OV", 1, num_vectors=2, head_index=0)
    directions = torch.linalg.svd(vision.OV[1, 0].AB).Vh[0] @ vision.W_U
    torch.testing.assert_close(found[:, 0, 0].abs(), directions.abs(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_class_logit_attributions_sum_to_the_class_logit(vision: HookedTower) -> None:
    texts = torch.nn.functional.normalize(torch.randn(3, 16), dim=-1)
    vision.set_classes(["red", "green", "blue"], texts)
    logits, found = vision.run_with_cache(tiny.pixels())
    embeds = vision(tiny.pixels(), return_type="embeds")
    torch.testing.assert_close(logits, embeds @ texts.T)
    stack = found.decompose_resid(layer=-1, pos_slice=0)
    for index, name in enumerate(("red", "green", "blue")):
        attributions = found.logit_attrs(stack, tokens=name, pos_slice=0, has_batch_dim=True)
        total = attributions.sum(0) + vision.logit_bias[index]
        torch.testing.assert_close(total, logits[:, index], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_token_logit_attributions_sum_to_the_token_logit(language: HookedTower) -> None:
    tokens = tower_input(language)
    logits, found = language.run_with_cache(tokens)
    stack = found.decompose_resid(layer=-1)
    answer = logits[:, -1].argmax(-1)
    attributions = found.logit_attrs(stack[:, :, -1], tokens=answer, pos_slice=-1)
    wanted = logits[torch.arange(2), -1, answer]
    torch.testing.assert_close(attributions.sum(0), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_language_tower_gives_the_whole_models_logits(language: HookedTower) -> None:
    tokens = tower_input(language)
    whole = model("llava").wrapped(input_ids=tokens).logits
    assert torch.equal(language(tokens), whole)
    loss = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(language(tokens, return_type="loss"), loss)


@torch.no_grad()
def test_given_inputs_reach_every_call_inside_the_block_and_none_after(language: HookedTower) -> None:
    whole, batch = model("llava").wrapped, inputs("llava")
    tokens, image = batch["input_ids"], {"pixel_values": batch["pixel_values"]}
    with language.given(**image):
        assert torch.equal(language(tokens), whole(**batch).logits)
        _, found = language.run_with_cache(tokens)
    _, passed = language.run_with_cache(tokens, **image)
    assert torch.equal(found["resid_post", 1], passed["resid_post", 1])
    with pytest.raises(RuntimeError, match="inside"), language.given(**image):
        raise RuntimeError("inside")
    blind = whole(input_ids=tokens).logits
    assert torch.equal(language(tokens), blind)
    assert not torch.equal(blind, whole(**batch).logits)


@torch.no_grad()
def test_given_inputs_reach_a_generation_too(language: HookedTower) -> None:
    whole, batch = model("llava").wrapped, inputs("llava")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = whole.generate(**batch, **options)
    told: dict[str, Any] = {**options, "stop_at_eos": False, "verbose": False}
    with language.given(pixel_values=batch["pixel_values"]):
        found = language.generate(batch["input_ids"], **told)
    assert torch.equal(found[:, : wanted.shape[1]], wanted)
    assert not torch.equal(language.generate(batch["input_ids"], **told)[:, : wanted.shape[1]], wanted)


@torch.no_grad()
def test_patching_by_head_equals_a_plain_torch_hook(vision: HookedTower) -> None:
    clean, corrupted = tiny.pixels(1), -tiny.pixels(1)
    _, cache_clean = vision.run_with_cache(clean)
    metric = lambda out: out[0].sum()  # noqa: E731
    found = patching.get_act_patch_attn_head_out_all_pos(vision, corrupted, cache_clean, metric)
    wrapped = model("clip").wrapped
    for layer in range(3):
        projection = wrapped.vision_model.encoder.layers[layer].self_attn.out_proj
        for head in range(4):
            part = slice(head * 8, head * 8 + 8)

            def swap(module: Any, args: Any, part: slice = part, layer: int = layer) -> Any:
                z = args[0].clone()
                z[..., part] = cache_clean["z", layer].flatten(2)[..., part]
                return (z,)

            handle = projection.register_forward_pre_hook(swap)
            slow = wrapped.get_image_features(pixel_values=corrupted).pooler_output[0].sum()
            handle.remove()
            torch.testing.assert_close(found[layer, head], slow, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_patching_by_position_runs_on_tokens(language: HookedTower) -> None:
    tokens = tower_input(language)[:1]
    other = tokens.clone()
    other[0, 3] = 20
    logits, cache_clean = language.run_with_cache(tokens)
    found = patching.get_act_patch_resid_pre(language, other, cache_clean, lambda out: out[0, -1].sum())
    assert found.shape == (3, 7)
    # Nothing before the changed token differs, and patching it at the first layer restores everything.
    broken = language(other)[0, -1].sum()
    torch.testing.assert_close(found[0, :3], broken.expand(3), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0, 3], logits[0, -1].sum(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hooks_see_their_layer_and_a_cache_key(language: HookedTower) -> None:
    tokens = tower_input(language)
    _, cached = language.run_with_cache(tokens)
    seen: list[int] = []

    def hook(value: Tensor, hook: Any) -> Tensor | None:
        seen.append(hook.layer())
        torch.testing.assert_close(value, cached[hook.name], rtol=1e-4, atol=1e-5)
        return value * 0 if hook.layer() == 2 else None

    changed = language.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_z"), hook)])
    assert seen == [0, 1, 2]
    assert (changed - language(tokens)).abs().max() > 1e-3


def test_hooks_added_stay_until_reset_and_permanent_ones_beyond(vision: HookedTower) -> None:
    calls: list[str] = []
    note = lambda value, hook: calls.append(hook.name)  # noqa: E731
    vision.add_hook("blocks.0.hook_resid_pre", note)
    vision.add_perma_hook("blocks.1.attn.hook_pattern", note)
    with torch.no_grad():
        vision(tiny.pixels())
        vision.reset_hooks()
        vision(tiny.pixels())
    assert calls == ["blocks.0.hook_resid_pre", *["blocks.1.attn.hook_pattern"] * 2]  # The tower's own names.
    vision.reset_hooks(including_permanent=True)
    assert not [p for p in vision.hook_points() if p.live]


@torch.no_grad()
def test_a_towers_hooks_inside_the_whole_models_leave_those_alone(vision: HookedTower) -> None:
    whole, calls = model("clip"), []
    outer = lambda value, hook: calls.append("outer")  # noqa: E731
    inner = lambda value, hook: calls.append("inner")  # noqa: E731
    with whole.hooks(fwd_hooks=[("vision.blocks.0.hook_resid_pre", outer)]):
        with vision.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", inner)]):
            whole(**inputs("clip"))
        whole(**inputs("clip"))
    whole(**inputs("clip"))
    assert calls == ["outer", "inner", "outer"]


def test_gradients_are_cached_with_incl_bwd(language: HookedTower) -> None:
    tokens = tower_input(language)
    _, found = language.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    run = model("llava").run(
        {"input_ids": tokens}, read=["language.blocks.1.attn.hook_pattern"], grad_of=partial(_loss, tokens)
    )
    torch.testing.assert_close(
        found["blocks.1.attn.hook_pattern_grad"], run.grads["language.blocks.1.attn.hook_pattern"]
    )
    assert len(found) == 2 * len(language.hook_dict)
    model("llava").wrapped.zero_grad()


def _loss(tokens: Tensor, output: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def test_names_filter_and_remove_batch_dim(vision: HookedTower) -> None:
    one = tiny.pixels(1)
    _, found = vision.run_with_cache(one, names_filter="blocks.0.attn.hook_z", remove_batch_dim=True)
    assert list(found.keys()) == ["blocks.0.attn.hook_z"]
    assert found["z", 0].shape == (5, 4, 8)
    _, found = vision.run_with_cache(one, names_filter=lambda n: n.endswith("pattern"))
    assert list(found.keys()) == [f"blocks.{i}.attn.hook_pattern" for i in range(3)]


@pytest.mark.parametrize("wrong", ["blocks.0.attn.hook_zz", "blocks.9.hook_resid_pre"])
def test_an_unknown_name_is_an_error_everywhere(vision: HookedTower, wrong: str) -> None:
    nothing = lambda value, hook: None  # noqa: E731
    with pytest.raises(mm.MissingSiteError, match="nearest are"):
        vision.run_with_hooks(tiny.pixels(), fwd_hooks=[(wrong, nothing)])
    with pytest.raises(KeyError, match="no site"):
        vision.run_with_cache(tiny.pixels(), names_filter=[wrong])
    with pytest.raises(mm.MissingSiteError):
        vision.add_hook(wrong, nothing)
    with pytest.raises(mm.MissingSiteError):
        model("clip").run(inputs("clip"), read=[f"vision.{wrong}"])
    assert not [p for p in vision.hook_points() if p.live]


def test_accumulated_bias_is_what_a_zero_stream_would_gain(language: HookedTower) -> None:
    vision = model("clip").tower("vision")
    wanted = vision.b_O[0] + vision.b_out[0] + vision.b_O[1]
    torch.testing.assert_close(vision.accumulated_bias(1, mlp_input=True), wanted)
    torch.testing.assert_close(vision.accumulated_bias(2, include_mlp_biases=False), vision.b_O[:2].sum(0))
    assert language.accumulated_bias(3).abs().sum() == 0


@torch.no_grad()
def test_final_norm_can_be_called(vision: HookedTower) -> None:
    x = torch.randn(2, 5, 32)
    norm = model("clip").wrapped.vision_model.post_layernorm
    assert torch.equal(vision.ln_final(x), norm(x))


def test_whole_model_cache_opens_by_tower() -> None:
    _, found = model("clip").run_with_cache(**inputs("clip"))
    assert found["vision.blocks.1.attn.hook_pattern"] is found.vision["pattern", 1]
    with pytest.raises(KeyError, match="shorthand goes through one"):
        found["pattern", 1]
    single = mm.HookedModel(tiny.CASES["clip_vision"]().model)
    _, found = single.run_with_cache(pixel_values=tiny.pixels())
    assert found["pattern", 1] is found["vision.blocks.1.attn.hook_pattern"]


def test_configuration_says_what_the_tower_is() -> None:
    cfg = model("llava_siglip_qwen").tower("language").cfg
    facts = SimpleNamespace(
        n_layers=3,
        n_heads=4,
        n_key_value_heads=2,
        d_head=8,
        d_model=32,
        d_mlp=40,
        d_vocab=60,
        n_ctx=64,
        gated_mlp=True,
        normalization_type="RMS",
    )
    for name, value in vars(facts).items():
        assert getattr(cfg, name) == value, name
    assert model("clip").tower("vision").cfg.n_ctx == 5


def test_a_hook_sees_the_names_of_the_model_that_it_was_added_to() -> None:
    model: Any = mm.load("tiny-clip")
    seen: list[tuple[str, int]] = []

    def look(value: Any, hook: Any) -> None:
        seen.append((hook.name, hook.layer()))

    images = [sample_images()["red_circle"]]
    pixels = model.prepare(images=images)["pixel_values"]
    model.run_with_hooks(text=["a"], images=images, fwd_hooks=[("vision.blocks.1.attn.hook_z", look)])
    model.run_with_hooks(
        text=["a"], images=images, fwd_hooks=[(lambda n: n == "vision.blocks.1.attn.hook_z", look)]
    )
    model.vision.run_with_hooks(pixels, fwd_hooks=[("blocks.1.attn.hook_z", look)])
    assert seen == [("vision.blocks.1.attn.hook_z", 1)] * 2 + [("blocks.1.attn.hook_z", 1)]
    held = model.vision.add_caching_hooks(lambda n: n.endswith("0.hook_resid_pre"))
    held_by_all = model.add_caching_hooks(lambda n: n.endswith("0.hook_resid_pre"))
    model(text=["a"], images=images)
    model.reset_hooks()
    assert set(held) == {"blocks.0.hook_resid_pre"}
    assert set(held_by_all) == {"vision.blocks.0.hook_resid_pre", "text.blocks.0.hook_resid_pre"}
    assert model.vision.hook_embed.name == "hook_embed"


def test_a_hook_that_is_removed_by_its_own_handle_is_gone(vision: HookedTower) -> None:
    # TransformerLens 4's bridge takes its hooks off so; in any version a user may.
    attention = vision._mounted.module.encoder.layers[0].self_attn
    point: Any = vision.blocks[0].attn.hook_pattern
    handles = [
        point.register_forward_hook(lambda *a: None),
        point.register_full_backward_hook(lambda *a: None),
    ]
    assert attention._forward_hooks
    for handle in handles:
        handle.remove()
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not point.live
