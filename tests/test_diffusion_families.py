"""Joint attention, guidance of both kinds, other pipelines of the same weights, adapters put on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_diffusion as td
import torch

import mm_adapters as mm
from mm_adapters.hooks.attention import attend
from mm_adapters.hooks.text_attention import JointText, attend_onto_text, by_rows, fused


def read(case: tiny.Case, *sites: str, **more: Any) -> mm.Run:
    return mm.HookedModel(case.model).run(case.inputs | more, read=list(sites))


@pytest.mark.parametrize(
    ("name", "block", "first"),
    [
        ("sd3_transformer", "blocks.1", "image"),
        ("flux_transformer", "blocks.0", "text"),
        ("flux_transformer", "single_blocks.0", "text"),
    ],
)
def test_the_text_part_of_a_joint_pattern_is_that_of_the_full_one(name: str, block: str, first: str) -> None:
    case = tiny.CASES[name]()
    site = f"denoiser.{block}.attn.hook_pattern"
    full, part = read(case, site)[site], read(case, f"{site}_text")[f"{site}_text"]
    n_text = case.inputs["encoder_hidden_states"].shape[1]
    text = slice(0, n_text) if first == "text" else slice(-n_text, None)
    image = slice(n_text, None) if first == "text" else slice(0, -n_text)
    torch.testing.assert_close(part, full[:, :, image, text], rtol=0, atol=2e-7)


@pytest.mark.parametrize("name", ["sd3_transformer", "flux_transformer"])
def test_an_edit_of_the_text_part_is_that_edit_of_the_full_pattern(name: str) -> None:
    case = tiny.CASES[name]()
    model, site = mm.HookedModel(case.model), "denoiser.blocks.0.attn.hook_pattern"
    n_text = case.inputs["encoder_hidden_states"].shape[1]
    text_first = model.sitemap.towers["denoiser"].record.joint.first == "text"  # type: ignore[union-attr]

    def silence(pattern: torch.Tensor) -> torch.Tensor:
        text, image = JointText(n_text, text_first).split(pattern.shape[-1])
        new = pattern.clone()
        new[:, :, image, text] *= 0.25
        return new

    whole = model.run(case.inputs, edit=[mm.Edit(site, silence)])
    part = model.run(case.inputs, edit=[mm.Edit(f"{site}_text", lambda p: p * 0.25)])
    torch.testing.assert_close(case.head(part.output), case.head(whole.output), rtol=1e-5, atol=1e-6)


def test_the_full_pattern_is_never_formed_for_its_text_part(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny.CASES["flux_transformer"]()
    monkeypatch.setattr("mm_adapters.hooks.attention.attend", lambda *a, **k: pytest.fail("formed"))
    read(case, "denoiser.blocks.0.attn.hook_pattern_text", "denoiser.single_blocks.0.attn.hook_q")


@pytest.mark.parametrize("masked", [False, True])
def test_every_way_to_the_logsumexp_agrees(masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 700, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.zeros(700, 700).masked_fill(torch.rand(700, 700) < 0.2, -torch.inf) if masked else None
    scores = q.double() @ k.double().mT * 0.3 + (0 if mask is None else mask.double())
    for way in (fused, by_rows):
        out, total = way(q, k, v, None if mask is None else mask.expand(2, 3, 700, 700), 0.3)
        torch.testing.assert_close(total.double(), scores.logsumexp(-1), rtol=0, atol=2e-5)
        torch.testing.assert_close(out.double(), scores.softmax(-1) @ v.double(), rtol=0, atol=2e-6)
    joint, shown = JointText(100, True), []
    note = lambda name, x: shown.append(x) or x  # noqa: E731
    z = attend_onto_text(note, q, k, v, mask, False, 0.3, joint)
    torch.testing.assert_close(shown[0].double(), scores.softmax(-1)[:, :, 100:, :100], rtol=0, atol=2e-6)
    torch.testing.assert_close(z, attend(lambda n, x: x, q, k, v, mask, scale=0.3), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux"])
def test_a_joint_layout_says_which_positions_are_text_and_which_latents(name: str) -> None:
    case = tiny.CASES[name]()
    model = mm.HookedModel(case.model)
    sizes = {k: case.inputs[k] for k in ("height", "width", "max_sequence_length")}
    layout = model.layout(text=["a cat", "a dog"], **sizes)["denoiser"]
    text_first = name == "flux"
    latents = layout.positions("latent")
    n_text = layout.n_pos - len(latents)
    assert latents == list(range(n_text, layout.n_pos) if text_first else range(len(latents)))
    assert layout.grid == ((2, 3) if text_first else (2, 2))
    site = "denoiser.blocks.0.attn.hook_pattern"
    run = model.run(case.inputs, read=[mm.Read(site, steps=[0]), mm.Read(f"{site}_text", steps=[0])])
    assert run[site].shape[-1] == layout.n_pos
    assert run[f"{site}_text"].shape[-2:] == (len(latents), n_text)
    # Words are found where the text is: once for each tower whose sequence is part of it.
    assert len(layout.where("cat", row=0)) == 3 * len(model.sitemap.model_record.joint_text)
    assert {layout.roles[0][p] for p in layout.where("a cat", row=0)} == {"word"}
    assert min(layout.where("cat")) < len(latents) if text_first else min(layout.where("cat")) >= len(latents)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_within_a_template_has_its_own_words_where_the_denoiser_sees_them(side: str) -> None:
    case = tiny.CASES["qwen_image"]()
    case.model.tokenizer.padding_side = side
    model = mm.HookedModel(case.model)
    texts = ["a cat", "a dog draws"]
    layouts = model.layout(text=texts, height=8, width=12)
    assert layouts["text"].texts == tuple(texts)
    for row, (word, n) in enumerate([("cat", 3), ("draws", 5)]):
        for tower in ("text", "denoiser"):
            where = layouts[tower].where(word, row=row)
            assert len(where) == n
            assert {layouts[tower].roles[row][p] for p in where} == {"word"}
    with pytest.raises(mm.WordNotFoundError, match="Its words: a, cat"):
        layouts["denoiser"].where("draw")
    inputs = case.inputs | {"prompt": texts, "negative_prompt": texts}
    run = model.run(
        inputs,
        read=[
            mm.Read("denoiser.blocks.0.attn.hook_pattern", steps=[0], rows="cond"),
            mm.Read("denoiser.hook_text_embed", steps=[0], rows="cond"),
        ],
    )
    layout = layouts["denoiser"]
    assert run["denoiser.blocks.0.attn.hook_pattern"].shape[-1] == layout.n_pos
    # Nobody attends to padding, and to all else somebody does; padding is zeros before it is embedded.
    attended = run["denoiser.blocks.0.attn.hook_pattern"][0].amax((1, 2)) > 0
    assert torch.equal(attended, ~layout.mask("pad"))


def test_calls_of_one_step_with_prompts_of_two_lengths_are_not_stacked() -> None:
    case = tiny.CASES["qwen_image"]()
    inputs = case.inputs | {"negative_prompt": ["a", "b"]}
    for engine in ("hooked", "nnsight"):
        model = mm.wrap(case.model, engine=engine)
        site = "denoiser.blocks.0.hook_text_resid_pre"
        with pytest.raises(mm.InputError, match='rows="cond"'):
            model.run(inputs, read=[site])
        cond = model.run(inputs, read=[mm.Read(site, rows="cond")])[site]
        uncond = model.run(inputs, read=[mm.Read(site, rows="uncond")])[site]
        assert cond.shape[2] > uncond.shape[2]


def test_a_picture_beside_the_latents_leaves_the_joint_layout_as_it_is() -> None:
    case = td.flux_control()
    model, site = mm.HookedModel(case.model), "denoiser.blocks.0.attn.hook_pattern"
    sizes = {k: case.inputs[k] for k in ("height", "width", "max_sequence_length")}
    layout = model.layout(text=["a cat", "a dog"], **sizes)["denoiser"]
    assert layout.grid == (2, 3)
    assert layout.n_pos == model.run(case.inputs, read=[mm.Read(site, steps=[0])])[site].shape[-1]


# -- guidance ------------------------------------------------------------------------------------


def test_guidance_by_two_calls_counts_steps_and_tells_the_calls_apart() -> None:
    case = tiny.CASES["flux"]()
    model, site = mm.HookedModel(case.model), "denoiser.blocks.0.hook_text_resid_pre"
    both = model.run(case.inputs, read=[site])
    assert both[site].shape[:2] == (2, 4)  # Steps, then the prompts of both calls.
    assert both.rows["denoiser"] == {"cond": slice(0, 2), "uncond": slice(2, 4)}
    for which in ("cond", "uncond"):
        alone = model.run(case.inputs, read=[mm.Read(site, rows=which)])[site]
        torch.testing.assert_close(alone, both[site][:, both.rows["denoiser"][which]], rtol=0, atol=0)
    other = model.run(case.inputs | {"negative_prompt": ["x", "y"]}, read=[mm.Read(site, rows="cond")])
    torch.testing.assert_close(other[site][0], both[site][0, :2], rtol=0, atol=0)
    last = model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, steps=[1], rows="uncond")])
    assert last.receipts[0].fired == 1
    plain = {k: v for k, v in case.inputs.items() if k not in ("negative_prompt", "true_cfg_scale")}
    assert model.run(plain, read=[site]).rows["denoiser"] == {"cond": slice(0, 2)}
    with pytest.raises(mm.InputError, match="not guided"):
        model.run(plain, edit=[mm.Edit(site, torch.zeros_like, rows="uncond")])


@pytest.mark.parametrize(
    ("name", "first"), [("pixart", "uncond"), ("dit", "cond"), ("deepfloyd_if", "uncond")]
)
def test_guidance_that_only_an_argument_says_is_known(name: str, first: str) -> None:
    case = tiny.CASES[name]()
    model, site = mm.HookedModel(case.model), "denoiser.hook_in"
    guided = model.run(case.inputs, read=[site])
    assert guided[site].shape[:2] == (2, 4)
    assert guided.rows["denoiser"][first] == slice(0, 2)
    alone = model.run(case.inputs | {"guidance_scale": 1.0}, read=[mm.Read(site, rows="cond")])
    assert alone[site].shape[:2] == (2, 2)
    assert alone.rows["denoiser"] == {"cond": slice(None)}


def test_every_pipeline_that_a_record_names_is_there_and_says_whether_it_is_guided() -> None:
    import diffusers

    named = [
        (record, cls.partition(":")[2])
        for record in mm.families.records()
        if getattr(record, "kind", "") == "diffusion"
        for cls in record.classes
    ]
    assert len(named) > 40
    unguided = set()
    for record, name in named:
        cls = getattr(diffusers, name)
        taken = inspect.signature(cls.__call__).parameters
        for guidance in (record.guidance, *record.more_loops.values()):
            if guidance is not None and guidance.flag is not None:
                assert isinstance(getattr(cls, guidance.flag), property), name
            elif guidance is not None and not {*guidance.scale.split("|")} <= taken.keys():
                unguided.add(name)
    # Of Flux' pipelines these take no scale of a true guidance.
    assert unguided == {"FluxFillPipeline", "FluxControlPipeline"}


def test_guidance_three_ways_has_rows_for_the_text_for_the_picture_and_for_neither() -> None:
    case = td.instruct_pix2pix()
    model = mm.HookedModel(case.model)
    words, seen = "denoiser.blocks.0.cross_attn.hook_k", "denoiser.hook_in"

    def moved(**change: Any) -> dict[str, set[str]]:
        runs = [model.run(case.inputs | more, read=[words, seen]) for more in ({}, change)]
        rows = runs[0].rows["denoiser"]
        assert list(rows) == ["cond", "image", "uncond"]
        changed = {
            site: [not torch.equal(a, b) for a, b in zip(*(run[site][0] for run in runs), strict=True)]
            for site in (words, seen)
        }
        return {site: {name for name, of in rows.items() if any(changed[site][of])} for site in changed}

    assert moved(prompt=["b", "c"]) == {words: {"cond"}, seen: set()}
    assert moved(image=td.noise(2, 3, 16, 16, seed=9).sigmoid()) == {words: set(), seen: {"cond", "image"}}
    alone = model.run(case.inputs, read=[mm.Read(seen, rows="image")])[seen]
    assert torch.equal(alone, model.run(case.inputs, read=[seen])[seen][:, 2:4])
    with pytest.raises(mm.InputError, match="has uncond, cond, all"):
        mm.HookedModel(tiny.CASES["stable_diffusion"]().model).run(
            tiny.CASES["stable_diffusion"]().inputs, read=[mm.Read(seen, rows="image")]
        )


# -- several loops in one pipeline -----------------------------------------------------------------


def test_each_loop_of_a_pipeline_has_steps_and_rows_of_its_own() -> None:
    case = tiny.CASES["unclip"]()
    model = mm.HookedModel(case.model)
    prior, drawn = "prior.blocks.0.hook_resid_pre", "denoiser.hook_in"
    sites = [prior, drawn, "projector.hook_time", "enlarger.hook_in", "last_enlarger.hook_in"]
    run = model.run(case.inputs | {"prior_num_inference_steps": 3}, read=sites)
    assert [run[s].shape[:2] for s in sites] == [(3, 4), (2, 4), (1, 4), (1, 2), (1, 2)]
    assert list(run.rows) == ["denoiser", "prior", "projector"]
    assert run.rows["prior"] == {"uncond": slice(0, 2), "cond": slice(2, 4)}
    other = model.run(case.inputs | {"prompt": ["b", "c"]}, read=[prior])[prior][0]
    same = [torch.equal(a, b) for a, b in zip(run[prior][0], other, strict=True)]
    assert same == [True, True, False, False]
    edit = [mm.Edit(prior, torch.zeros_like, steps=[1], rows="cond")]
    edited = model.run(case.inputs | {"prior_num_inference_steps": 3}, edit=edit, read=[prior])
    assert edited.receipts[0].fired == 1
    assert [torch.equal(edited[prior][step], run[prior][step]) for step in (0, 1)] == [True, False]
    # One scale above one gives both loops unconditional rows.
    one, none = {"prior_guidance_scale": 1.0}, {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0}
    assert model.run(case.inputs | one, read=[drawn]).rows["denoiser"]["cond"] == slice(2, 4)
    assert model.run(case.inputs | none, read=[drawn]).rows["denoiser"] == {"cond": slice(None)}
    with pytest.raises(mm.InputError, match="no classifier-free guidance there"):
        model.run(case.inputs, read=[mm.Read("enlarger.hook_in", rows="cond")])


def test_loops_may_be_guided_apart() -> None:
    case = tiny.CASES["stable_unclip"]()
    model, sites = mm.HookedModel(case.model), ["prior.hook_pooled", "denoiser.hook_in"]
    run = model.run(case.inputs | {"prior_guidance_scale": 1.0}, read=sites)
    assert [run[s].shape[1] for s in sites] == [2, 4]
    assert run.rows["prior"] == {"cond": slice(None)}
    assert run.rows["denoiser"] == {"uncond": slice(0, 2), "cond": slice(2, 4)}
    layouts = model.layout(text=["a cat", "a dog"])
    assert layouts["text_prior"].where("dog", row=1) == layouts["text"].where("dog", row=1) == [2, 3, 4]


# -- the same weights, elsewhere and with more on them ---------------------------------------------


@pytest.mark.parametrize("make", [td.image_to_image, td.inpainting, td.controlled, td.consistency])
def test_other_pipelines_of_the_same_weights_have_the_same_sites(make: Any) -> None:
    from mm_adapters.traced import TracedModel

    case = make()
    model, usual = mm.HookedModel(case.model), mm.HookedModel(tiny.CASES["stable_diffusion"]().model)
    assert list(model.sitemap.sites) == list(usual.sitemap.sites)
    sites = list(model.sitemap.sites)
    run, plain = model.run(case.inputs, read=sites), case.head(model(**case.inputs))
    assert set(run.values) == set(sites)
    torch.testing.assert_close(case.head(run.output), plain, rtol=0, atol=1e-5)
    some = [sites[len(sites) // 2], sites[-1], "denoiser.blocks.0.cross_attn.hook_pattern"]
    one, other = model.run(case.inputs, read=some), TracedModel(case.model).run(case.inputs, read=some)
    assert all(torch.equal(one[s], other[s]) for s in some)


def test_steps_of_an_autoencoder_count_its_decodings() -> None:
    case = tiny.CASES["stable_diffusion"]()
    model, site = mm.HookedModel(case.model), "vae.resnets.0.hook_out"
    every = model.run(case.inputs, read=[site])[site]
    assert torch.equal(model.run(case.inputs, read=[mm.Read(site, steps=[0])])[site], every)
    with pytest.raises(mm.EditNeverFiredError):
        model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like, steps=[1])])


def test_a_lora_from_a_file_is_in_the_sites_of_both_engines(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from mm_adapters.traced import TracedModel

    teacher = tiny.CASES["stable_diffusion"]().model
    teacher.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    tuned = teacher.text_encoder
    tuned.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(teacher.unet), get_peft_model_state_dict(tuned)
    )
    case = tiny.CASES["stable_diffusion"]()
    q, normed = "denoiser.blocks.0.cross_attn.hook_q", "denoiser.blocks.0.ln2.hook_normalized"
    v, usual = "text.blocks.1.attn.hook_v", mm.HookedModel(case.model)
    before = usual.run(case.inputs, read=[q, v])
    case.model.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    model = mm.HookedModel(case.model)
    assert list(model.sitemap.sites) == list(usual.sitemap.sites)
    after = model.run(case.inputs, read=[q, v, normed])
    layer = case.model.unet.get_submodule(model.sitemap[q].module.removeprefix("unet."))
    norm = case.model.unet.get_submodule(model.sitemap[normed].module.removeprefix("unet."))
    x = after[normed] * norm.weight + norm.bias
    (down, up), scale = ((layer.lora_A, layer.lora_B), layer.scaling)
    name = next(iter(scale))
    want = layer.base_layer(x) + up[name](down[name](x)) * scale[name]
    torch.testing.assert_close(after[q].flatten(-2), want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[v], before[v])
    edits = [mm.Edit(site, lambda y: y * 2) for site in (q, v)]
    one, other = (m.run(case.inputs, read=[q, v], edit=edits) for m in (model, TracedModel(case.model)))
    assert all(torch.equal(one[s], other[s]) for s in (q, v))
    assert all(receipt.moved > 0 for receipt in one.receipts)
    assert not torch.allclose(case.head(one.output), case.head(after.output))
    case.model.unload_lora_weights()
    again = mm.HookedModel(case.model).run(case.inputs, read=[q, v])
    assert all(torch.equal(again[s], before[s]) for s in (q, v))


def test_a_lora_is_part_of_what_its_layer_gives() -> None:
    from peft import LoraConfig

    case = tiny.CASES["unet"]()
    site = "denoiser.blocks.0.cross_attn.hook_q"
    before = read(case, site)[site]
    case.model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model = mm.HookedModel(case.model.eval())
    after = read(case, site, "denoiser.blocks.0.hook_resid_mid", "denoiser.blocks.0.ln2.hook_normalized")
    layer = case.model.get_submodule(model.sitemap[site].module)
    want = layer(after["denoiser.blocks.0.ln2.hook_normalized"] * 1.0)
    assert not torch.allclose(after[site], before)
    assert want.shape[:2] == after[site].shape[:2]
    case.model.disable_adapters()
    assert torch.equal(read(case, site)[site], before)


def adapted(folder: Path) -> tuple[tiny.Case, mm.HookedModel]:
    """Stable Diffusion with an IP-Adapter that was read from a file."""
    from safetensors.torch import save_file

    case = td.ip_adapter()
    case.model.unload_ip_adapter()
    case.model.register_modules(image_encoder=td.ip_adapter().model.image_encoder)
    weights = td.adapter_weights(case.model.unet)
    flat = {f"{part}.{name}": x for part, named in weights.items() for name, x in named.items()}
    save_file(flat, folder / "adapter.safetensors")
    case.model.load_ip_adapter(str(folder), "", "adapter.safetensors", low_cpu_mem_usage=False)
    return case, mm.HookedModel(case.model)


def test_an_image_prompt_has_keys_values_and_a_pattern_of_its_own(tmp_path: Path) -> None:
    case, model = adapted(tmp_path)
    block = "denoiser.blocks.0"
    sites = [
        f"{block}.cross_attn.hook_q",
        *(f"{block}.image_prompt.hook_{x}" for x in "kvz"),
        f"{block}.image_prompt.hook_pattern",
        f"{block}.cross_attn.hook_z",
        f"{block}.cross_attn.hook_pattern",
        f"{block}.cross_attn.hook_v",
    ]
    run = model.run(case.inputs, read=[mm.Read(s, steps=[0]) for s in sites])
    q, k, v, z, pattern, total, onto_text, words = (run[s][0] for s in sites)
    attention = case.model.unet.get_submodule(
        model.sitemap[sites[0]].module.removeprefix("unet.").removesuffix(".to_q")
    )
    embeds = case.model.prepare_ip_adapter_image_embeds(case.inputs["ip_adapter_image"], None, "cpu", 1, True)
    (projected,) = case.model.unet.encoder_hid_proj(embeds)
    keys = attention.processor.to_k_ip[0](projected).flatten(1, 2).unflatten(-1, (attention.heads, -1))
    torch.testing.assert_close(k, keys, rtol=1e-5, atol=1e-5)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    torch.testing.assert_close(pattern, scores.softmax(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z, torch.einsum("bhqk,bkhd->bqhd", pattern, v), rtol=1e-5, atol=1e-5)
    # What leaves the layer is of the words and of the picture.
    torch.testing.assert_close(
        total - z, torch.einsum("bhqk,bkhd->bqhd", onto_text, words), rtol=1e-4, atol=1e-4
    )


def test_an_image_prompt_that_is_not_looked_at_is_as_one_of_scale_zero(tmp_path: Path) -> None:
    from mm_adapters.traced import TracedModel

    case, model = adapted(tmp_path)
    patterns = [s for s in model.sitemap.sites if s.endswith("image_prompt.hook_pattern")]
    assert len(patterns) == 4
    blind = [mm.Edit(s, torch.zeros_like) for s in patterns]
    outputs = [case.head(m.run(case.inputs, edit=blind).output) for m in (model, TracedModel(case.model))]
    seen = case.head(model(**case.inputs))
    case.model.set_ip_adapter_scale(0.0)
    reference = case.head(model(**case.inputs))
    assert (seen - reference).abs().max() > 1e-2
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], reference, rtol=0, atol=1e-5)
    with pytest.raises(mm.EditNeverFiredError):  # At scale zero nothing attends to the picture.
        model.run(case.inputs, edit=blind[:1])


def test_the_layout_says_which_tokens_are_of_which_picture(tmp_path: Path) -> None:
    case, model = adapted(tmp_path)
    pictures, site = case.inputs["ip_adapter_image"], "denoiser.blocks.0.image_prompt.hook_k"
    layout = model.layout(text=["a cat"], ip_adapter_image=pictures)["image_prompt"]
    assert layout.positions("image") == list(range(8))
    assert layout.image_index[0] == (0,) * 4 + (1,) * 4
    changed = [[pictures[0][0], pictures[0][1].rotate(90)]]
    keys = [
        model.run(case.inputs | {"ip_adapter_image": given}, read=[site])[site][0]
        for given in (pictures, changed)
    ]
    assert keys[0].shape[1] == layout.n_pos
    moved = (keys[0] - keys[1]).abs().amax((0, 2, 3)) > 1e-6
    assert moved.tolist() == [i == 1 for i in layout.image_index[0]]
    embeds = [td.noise(2, 3, 16)]
    assert model.layout(text=["a cat"], ip_adapter_image_embeds=embeds)["image_prompt"].n_pos == 12
    assert "image_prompt" not in model.layout(text=["a cat"])
    plain = mm.HookedModel(tiny.CASES["stable_diffusion"]().model)
    with pytest.raises(mm.InputError, match="No adapter reads a picture here"):
        plain.layout(text=["a cat"], ip_adapter_image=pictures)


def test_an_image_prompt_adapter_leaves_the_text_attention_its_own() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    case = tiny.CASES["unet"]()
    site = "denoiser.blocks.0.cross_attn.hook_pattern"
    before = read(case, site)[site]
    name = mm.HookedModel(case.model).sitemap[site].module
    attention = case.model.get_submodule(name)
    hidden, text = attention.to_q.in_features, attention.to_k.in_features
    torch.manual_seed(0)
    attention.processor = IPAdapterAttnProcessor2_0(hidden, text, num_tokens=(3,), scale=0.5)
    inner, calls = attention.processor, []

    class WithImage(torch.nn.Module):  # A pipeline gives text and image embeddings as a pair.
        def __call__(self, attn: Any, hidden: Any, encoder_hidden_states: Any = None, **more: Any) -> Any:
            calls.append(1)
            image = torch.ones(len(hidden), 3, text)
            return inner(attn, hidden, (encoder_hidden_states, [image[:, None]]), **more)

    attention.processor = WithImage()
    model = mm.HookedModel(case.model)
    run = model.run(case.inputs, read=[site])
    assert calls
    torch.testing.assert_close(run[site], before, rtol=0, atol=1e-6)
    silent = model.run(case.inputs, edit=[mm.Edit(site, torch.zeros_like)])
    assert not torch.allclose(case.head(silent.output), case.head(run.output))
