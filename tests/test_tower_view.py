"""What methods ask of a tower: its unembedding, its pooling, the maps to its summary."""

from __future__ import annotations

import pytest
import tiny
import torch

import mm_adapters as mm


def test_the_unembedding_reads_the_models_own_logits_off_the_last_residual() -> None:
    built = tiny.CASES["blip_2"]()  # Its decoder is an OPT, whose final norm has a bias.
    model = mm.HookedModel(built.model)
    view = model.towers["language"]
    run = model.run(built.inputs, read=["language.ln_final.hook_normalized"])
    ids = torch.tensor([5, 9, 30])
    directions = view.token_directions(ids)
    logits = run["language.ln_final.hook_normalized"] @ directions.T + view.unembedding_bias[ids]
    torch.testing.assert_close(logits, view.vocabulary_logits(run.output)[..., ids], rtol=1e-4, atol=1e-5)
    language = model.tower("language")
    assert torch.equal(view.unembedding, language.W_U)
    assert torch.equal(view.unembedding_bias, language.logit_bias)
    assert torch.equal(directions, language.tokens_to_residual_directions(ids))


@pytest.mark.parametrize(("name", "tower"), [("llama", "language"), ("clip", "text"), ("llava", "vision")])
def test_a_tower_that_writes_no_words_has_no_unembedding(name: str, tower: str) -> None:
    view = mm.SiteMap(tiny.CASES[name]().model).tower(tower)
    with pytest.raises(mm.MissingSiteError, match=f"The {tower} tower has no unembedding"):
        _ = view.unembedding
    with pytest.raises(mm.MissingSiteError, match="no unembedding"):
        view.vocabulary_logits(None)


def test_several_maps_to_the_summary_are_one() -> None:
    built = tiny.CASES["altclip"]()
    texts = {k: v for k, v in built.inputs.items() if k != "pixel_values"}
    model = mm.HookedModel(built.model)
    view = model.towers["text"]
    run = model.run(texts, read=["text.ln_projected.hook_normalized"])
    norm = built.model.text_model.pre_LN
    first = run["text.ln_projected.hook_normalized"][:, 0] * norm.weight + norm.bias
    assert view.projection is not None
    assert view.projection_bias is not None
    summary = first @ view.projection + view.projection_bias
    torch.testing.assert_close(summary, view.summary(run.output), rtol=1e-4, atol=1e-5)


def test_the_weights_that_pool_by_attention_are_those_of_the_module() -> None:
    built = tiny.CASES["siglip_vision"]()
    weights = mm.SiteMap(built.model).tower("vision").pool_weights.names("pool.attn")
    attention = built.model.head.attention
    value = attention.in_proj_weight.chunk(3)[2].unflatten(0, (attention.num_heads, -1)).mT
    assert torch.equal(weights["W_V"](), value)
    assert torch.equal(weights["W_O"]().flatten(0, 1), attention.out_proj.weight.T)


def test_what_a_family_may_lack_is_absent_only_where_it_lacks_it() -> None:
    plain, average = (mm.SiteMap(tiny.CASES[n]().model) for n in ("timm_vit", "timm_vit_average"))
    assert "vision.ln_final.hook_scale" in plain.sites
    assert "vision.ln_final.*" not in plain.absent
    with pytest.raises(mm.MissingSiteError, match="ln_pooled"):
        average.check("vision.ln_final.hook_scale")


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip"])
@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_an_embedding_is_the_runs_own_and_gradients_reach_the_pixels(name: str, engine: str) -> None:
    case = tiny.CASES[name]()
    model = mm.wrap(case.model, engine=engine)
    vision = model.check_tower("vision")
    pixels = tiny.pixels().requires_grad_()
    embedded = vision.embed(**{vision.input_name: pixels})
    run = model.run({vision.input_name: pixels.detach()})
    torch.testing.assert_close(embedded.detach(), vision.summary(run.output))
    embedded.square().sum().backward()
    assert pixels.grad is not None
    assert bool((pixels.grad != 0).any())
