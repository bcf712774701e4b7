"""The wrapped model stays itself, and runs as asked."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm


def llava() -> tuple[Any, mm.HookedModel, dict[str, Tensor]]:
    case = tiny.llava()
    return case.model, mm.HookedModel(case.model), case.inputs


def zero_head(value: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(value[..., :1, :]), value[..., 1:, :]], -2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pattern_is_read_and_edited_whichever_kernel_the_model_was_loaded_with(attention: str) -> None:
    case = tiny.clip()
    case.model.set_attn_implementation(attention)
    model = mm.HookedModel(case.model)
    site = "vision.blocks.1.attn.hook_pattern"
    run = model.run(case.inputs, read=[site, "vision.blocks.1.attn.hook_q", "vision.blocks.1.attn.hook_k"])
    q, k = run["vision.blocks.1.attn.hook_q"], run["vision.blocks.1.attn.hook_k"]
    by_hand = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(run[site], by_hand, rtol=1e-5, atol=1e-6)
    uniform = model.run(case.inputs, edit=[mm.Edit(site, lambda p: torch.full_like(p, 0.2))])
    assert (uniform.output.logits_per_image - run.output.logits_per_image).abs().max() > 1e-4
    assert case.model.config._attn_implementation == attention


def test_a_kernel_nobody_can_watch_is_an_error_not_a_silence() -> None:
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    attention = case.model.vision_model.encoder.layers[0].self_attn
    attention.forward = lambda hidden_states, **kw: (hidden_states, None)  # Attends with nothing we know.
    with pytest.raises(mm.AttentionUnreachableError, match="sdpa"):
        model.run(case.inputs, read=["vision.blocks.0.attn.hook_pattern"])
    del attention.forward
    model.run(case.inputs, read=["vision.blocks.0.attn.hook_pattern"])


def test_heads_that_do_not_matter_to_the_pattern_keep_the_fused_kernel() -> None:
    """Watching one layer leaves every other layer on the model's own kernel."""
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    first = "vision.blocks.0.hook_resid_post"
    plain = model.run(case.inputs, read=[first])
    watched = model.run(case.inputs, read=[first, "vision.blocks.2.attn.hook_pattern"])
    assert torch.equal(plain[first], watched[first])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pattern_that_is_read_keeps_its_bits_where_gradients_are_wanted(attention: str) -> None:
    case = tiny.clip()
    case.model.set_attn_implementation(attention)
    model = mm.HookedModel(case.model)
    pixels = case.inputs["pixel_values"].clone().requires_grad_()
    plain = case.model.get_image_features(pixels).pooler_output
    seen = []
    hooks = [("blocks.1.attn.hook_pattern", lambda value, hook: seen.append(value))]
    watched = model.vision.run_with_hooks(pixels, fwd_hooks=hooks)
    assert torch.equal(watched, plain)
    at_pattern, through_pattern = torch.autograd.grad(watched.square().sum(), [seen[0], pixels])
    (through_kernel,) = torch.autograd.grad(plain.square().sum(), pixels)
    torch.testing.assert_close(through_pattern, through_kernel, rtol=1e-4, atol=1e-5)
    step = 1e-3 * at_pattern.sign()
    with torch.no_grad():
        hooks = [("blocks.1.attn.hook_pattern", lambda value, hook: value + step)]
        moved = model.vision.run_with_hooks(pixels, fwd_hooks=hooks)
    change = moved.square().sum() - plain.square().sum()
    torch.testing.assert_close(change, (at_pattern * step).sum(), rtol=2e-2, atol=1e-4)


def test_a_norm_that_is_read_keeps_its_bits_where_gradients_are_wanted() -> None:
    """Its parts are formed for the gradient of its scale; the value that goes on is the model's own."""
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    pixels = case.inputs["pixel_values"].clone().requires_grad_()
    plain = case.model.get_image_features(pixels).pooler_output
    seen = []
    hooks = [(lambda name: name.endswith("ln1.hook_scale"), lambda value, hook: seen.append(value))]
    watched = model.vision.run_with_hooks(pixels, fwd_hooks=hooks)
    assert torch.equal(watched, plain)
    (through_parts,) = torch.autograd.grad(watched.square().sum(), pixels, retain_graph=True)
    (through_kernel,) = torch.autograd.grad(plain.square().sum(), pixels)
    torch.testing.assert_close(through_parts, through_kernel, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(watched.sum(), seen[1])
    step = 1e-3 * gradient.sign()
    with torch.no_grad():
        hooks = [("blocks.1.ln1.hook_scale", lambda value, hook: value + step)]
        moved = model.vision.run_with_hooks(pixels, fwd_hooks=hooks)
    torch.testing.assert_close((moved - plain).sum(), (gradient * step).sum(), rtol=2e-2, atol=1e-4)


def test_llava_sees_an_edit_of_its_feature_layer_even_after_its_own_recorders_are_on() -> None:
    module, model, inputs = llava()
    with torch.no_grad():
        reference = module(**inputs).logits  # transformers puts its recorders on here.
    for site in ("vision.blocks.1.hook_resid_post", "vision.blocks.1.hook_resid_mid"):
        edited = model.run(inputs, edit=[mm.Edit(site, torch.zeros_like)]).output.logits
        assert (edited - reference).abs().max() > 1e-3


def test_output_hidden_states_are_the_edited_ones_and_as_before_afterwards() -> None:
    module, model, inputs = llava()
    with torch.no_grad():
        before = module(**inputs, output_hidden_states=True).hidden_states
        edit = mm.Edit("language.blocks.0.hook_resid_post", torch.zeros_like)
        during = model.run({**inputs, "output_hidden_states": True}, edit=[edit]).output.hidden_states
        after = module(**inputs, output_hidden_states=True).hidden_states
    assert during[1].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_lora_added_after_wrapping_is_seen_and_still_there() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    case = tiny.clip()
    model = mm.HookedModel(case.model)
    plain = model.run(case.inputs, read=["vision.blocks.0.attn.hook_q"])
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = inject_adapter_in_model(config, case.model)
    model = mm.HookedModel(adapted)
    run = model.run(case.inputs, read=["vision.blocks.0.attn.hook_q"])
    assert (run["vision.blocks.0.attn.hook_q"] - plain["vision.blocks.0.attn.hook_q"]).abs().max() > 1e-3
    assert any("lora_A" in k for k in adapted.state_dict())
    with torch.no_grad():
        assert torch.equal(model(**case.inputs).logits_per_image, adapted(**case.inputs).logits_per_image)


def test_the_lens_adds_no_keys_and_moves_with_the_model() -> None:
    case = tiny.clip()
    keys = list(case.model.state_dict())
    model = mm.HookedModel(case.model)
    assert list(model.state_dict()) == keys
    assert list(case.model.state_dict()) == keys
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in case.model.parameters())
    model.to(torch.float64)
    assert case.model.dtype == model.dtype == torch.float64
    assert model.tower("vision").cfg.dtype == torch.float64
    model.to("meta")
    assert model.device.type == "meta"
    with pytest.raises(mm.MetaDeviceError, match="no weights to run"):
        model(**case.inputs)
    assert len(model.sites("vision.blocks.*")) == 51


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "open_clip", "llava", "stable_diffusion"])
def test_half_precision_reads_and_edits_in_its_own_dtype(name: str, dtype: torch.dtype) -> None:
    case = tiny.CASES[name]()
    model = mm.HookedModel(case.model).to(dtype)
    inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in case.inputs.items()
    }
    run = model.run(inputs, read=list(model.sitemap.sites))
    kept = {s for s in model.sitemap.sites if not s.endswith(("hook_scale", "hook_normalized"))}
    assert {run[s].dtype for s in kept} == {dtype}
    assert all(torch.isfinite(v).all() or "scores" in s for s, v in run.values.items())
    for part in ("attn.hook_pattern", "hook_resid_mid", "ln1.hook_scale"):
        site = next(s for s in model.sitemap.sites if s.endswith(part))
        edited = model.run(inputs, edit=[mm.Edit(site, lambda x: x * 0.5)])
        assert edited.receipts[0].moved == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_with_edits_is_the_same_with_and_without_the_kv_cache(use_cache: bool) -> None:
    module, model, inputs = llava()
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    with torch.no_grad():
        own = module.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache)
    assert torch.equal(plain, own)
    everywhere = mm.Edit("language.blocks.1.attn.hook_z", zero_head)
    at_a_place = mm.Edit("language.blocks.0.hook_resid_post", lambda x: x * -3, positions=[2, 11])
    run = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, use_cache=use_cache, edit=[everywhere, at_a_place]
    )
    # The same edits by hand, on whole sequences.
    slow = _slow_generation(model, inputs, 6)
    assert torch.equal(run.output, slow)
    assert not torch.equal(run.output, own)


def _slow_generation(model: mm.HookedModel, inputs: dict[str, Tensor], n_new: int) -> Tensor:
    """Greedy decoding that runs the whole sequence again for each token, edited by plain hooks."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def place(x: Tensor) -> Tensor:
        x = x.clone()
        for position in (2, 11):
            if position < x.shape[1]:
                x[:, position] *= -3
        return x

    finished = torch.zeros(ids.shape[0], dtype=torch.bool)
    for _ in range(n_new):
        edits = [
            mm.Edit("language.blocks.1.attn.hook_z", zero_head),
            mm.Edit("language.blocks.0.hook_resid_post", place),
        ]
        run = model.run(
            {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}, edit=edits
        )
        new = run.output.logits[:, -1].argmax(-1)
        new = torch.where(finished, torch.zeros_like(new), new)
        finished |= new == 2
        ids, mask = torch.cat([ids, new[:, None]], 1), torch.cat([mask, mask[:, :1]], 1)
        if finished.all():
            break
    return ids


def test_edits_and_reads_of_rows_and_steps_touch_only_those() -> None:
    case = tiny.stable_diffusion()
    model = mm.HookedModel(case.model)
    site = "denoiser.blocks.1.cross_attn.hook_pattern"
    plain = model.run(case.inputs, read=[site])
    assert plain[site].shape == (2, 4, 4, 16, 16)  # step, rows, head, query, word
    cond, uncond = plain.rows["denoiser"]["cond"], plain.rows["denoiser"]["uncond"]
    assert (cond, uncond) == (slice(2, 4), slice(0, 2))
    # Both prompts' unconditional rows are the same text.
    text = model.run(case.inputs, read=["text.hook_embed"])["text.hook_embed"]
    assert torch.equal(text[2], text[3])
    assert not torch.equal(text[0], text[1])
    one = model.run(case.inputs, read=[mm.Read(site, rows="cond", steps=[1])])
    assert torch.equal(one[site], plain[site][1:2, cond])
    double = mm.Edit(site, lambda p: p * 2, steps=[1], rows="cond")
    edited = model.run(case.inputs, read=[site], edit=[double])
    torch.testing.assert_close(edited[site][0], plain[site][0], rtol=0, atol=0)
    torch.testing.assert_close(edited[site][1, cond], plain[site][1, cond] * 2)
    torch.testing.assert_close(edited[site][1, uncond], plain[site][1, uncond], rtol=0, atol=0)
    assert edited.receipts[0].fired == 1


def test_without_guidance_every_row_is_conditional_and_uncond_is_an_error() -> None:
    case = tiny.stable_diffusion()
    model = mm.HookedModel(case.model)
    inputs = {**case.inputs, "guidance_scale": 1.0}
    run = model.run(inputs, read=[mm.Read("denoiser.hook_out", rows="cond")])
    assert run["denoiser.hook_out"].shape == (2, 2, 4, 8, 8)
    with pytest.raises(mm.InputError, match="this run is not guided"):
        model.run(inputs, edit=[mm.Edit("denoiser.hook_out", lambda x: x, rows="uncond")])


def test_text_rows_of_a_guided_run_are_told_by_the_call() -> None:
    case = tiny.stable_diffusion()
    model = mm.HookedModel(case.model)
    edit = mm.Edit("text.hook_embed", torch.zeros_like, rows="uncond")
    run = model.run(case.inputs, read=["text.hook_embed"], edit=[edit])
    assert run["text.hook_embed"][2:].abs().max() == 0
    assert run["text.hook_embed"][:2].abs().max() > 0


def test_reducing_while_reading_equals_reading_then_reducing() -> None:
    case = tiny.stable_diffusion()
    model = mm.HookedModel(case.model)
    site = "denoiser.blocks.0.cross_attn.hook_pattern"
    folded = model.run(case.inputs, read=[mm.Read(site, reduce=lambda p: p.mean((0, 1)))])
    torch.testing.assert_close(folded[site], model.run(case.inputs, read=[site])[site].mean((1, 2)))


def test_a_seed_makes_a_run_repeatable_and_equals_the_pipelines_generator() -> None:
    case = tiny.stable_diffusion()
    model = mm.HookedModel(case.model)
    with torch.no_grad():
        first, again = model(**case.inputs).images, model(**case.inputs).images
        own = case.model(
            "a cat", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(3)
        ).images
        assert torch.equal(model("a cat", num_inference_steps=2, output_type="pt", seed=3).images, own)
    assert torch.equal(first, again)


def test_an_edit_that_never_fires_is_an_error() -> None:
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    images = {"pixel_values": case.inputs["pixel_values"]}
    vision = mm.HookedModel(case.model.vision_model)
    vision.run(images, edit=[mm.Edit("vision.hook_embed", lambda x: x)])
    with pytest.raises(mm.InputError, match="no position 99"):
        model.run(case.inputs, edit=[mm.Edit("vision.blocks.0.hook_resid_pre", lambda x: x, positions=[99])])


def test_an_edit_must_keep_the_shape() -> None:
    case = tiny.clip()
    with pytest.raises(ValueError, match="returns a tensor of the same shape"):
        mm.HookedModel(case.model).run(case.inputs, edit=[mm.Edit("vision.hook_embed", lambda x: x[0])])


def test_sites_print_names_axes_and_why_some_are_absent() -> None:
    model = mm.HookedModel(tiny.open_clip().model)
    printed = str(model.sites("text.hook_*"))
    assert "text.hook_embed" in printed
    assert "[batch, pos, d_model]" in printed
    assert "text.hook_pos_embed" in printed
    assert "absent: the position table is added without a module; see W_pos" in printed
    with pytest.raises(mm.MissingSiteError, match="out of reach: the position table"):
        model.run({}, read=["text.hook_pos_embed"])


def test_a_model_without_a_processor_says_how_to_give_one() -> None:
    with pytest.raises(mm.InputError, match=r"mm_adapters.wrap\(model, processor="):
        mm.HookedModel(tiny.clip().model)(text=["a cat"])


def test_cross_attention_patterns_equal_plain_hooks_on_the_projections() -> None:
    case = tiny.unet()
    seen: dict[str, Tensor] = {}
    attention = {
        name: module for name, module in case.model.named_modules() if name.endswith(("attn1", "attn2"))
    }
    handles = [
        getattr(module, part).register_forward_hook(
            lambda m, a, out, key=f"{name}.{part}": seen.__setitem__(key, out)
        )
        for name, module in attention.items()
        for part in ("to_q", "to_k")
    ]
    model = mm.HookedModel(case.model)
    patterns = [s for s in model.sitemap.sites if s.endswith("hook_pattern")]
    run = model.run(case.inputs, read=patterns)
    for handle in handles:
        handle.remove()
    assert len(patterns) == len(attention) == 8
    for site in patterns:
        path = model.sitemap[site].module
        heads = attention[path].heads
        q, k = (seen[f"{path}.{part}"].unflatten(-1, (heads, -1)) for part in ("to_q", "to_k"))
        by_hand = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(run[site], by_hand, rtol=1e-5, atol=1e-6)


def test_blocks_of_a_unet_are_numbered_down_middle_up() -> None:
    model = mm.HookedModel(tiny.unet().model)
    parts = [path.partition("_")[0] for path in model.sitemap.towers["denoiser"].stacks["blocks"]]
    assert parts == ["down", "mid", "up", "up"]


def test_layout_says_which_positions_are_patches_and_words() -> None:
    import tiny_tokenizers

    case = tiny.clip()
    model = mm.wrap(case.model, tokenizer=tiny_tokenizers.clip())
    vision = model.layout(pixel_values=case.inputs["pixel_values"])["vision"]
    assert vision.roles[0] == ("class", *["patch"] * 4)
    assert vision.patch_rc(4) == (1, 1)
