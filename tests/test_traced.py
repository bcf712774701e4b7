"""The nnsight engine: the same numbers as the TransformerLens one, and nnsight's own ways with sites."""

# ruff: noqa: PT012, SIM117  A traced block is one statement, and its `with` stands alone.
from __future__ import annotations

import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import beartype  # noqa: F401  Before nnsight, whose `.save` on every object it cannot be imported after.
import nnsight
import pytest
import tiny
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from test_families import count_hooks, plain

import mm_adapters as mm
from mm_adapters.hooks.kept import Kept
from mm_adapters.nnsight_engine.fast_path import LocationState
from mm_adapters.nnsight_engine.points import Always
from mm_adapters.traced import TracedModel

each_family = pytest.mark.parametrize("name", tiny.CASES)


def once(name: str, built: tiny.Case) -> dict[str, Any]:
    """The inputs for one step and one text, as far as the pipeline can: in a second step, or in the second
    call that guidance makes, a block's request is met, and fused attention rounds otherwise."""
    loop = both(name)[1].sitemap.model_record.loop
    taken = inspect.signature(type(built.model).__call__).parameters if loop else {}
    # The prior's scheduler divides by the steps less one, and so do unCLIP's.
    fewest = {
        k: 2 if name == "kandinsky_prior" or k != "num_inference_steps" else 1
        for k in taken
        if k.endswith("num_inference_steps")
    }
    return built.inputs | fewest | {k: 1.0 for k in taken if k.endswith(("guidance_scale", "true_cfg_scale"))}


@cache
def both(name: str) -> tuple[tiny.Case, mm.HookedModel, TracedModel]:
    built = tiny.CASES[name]()
    return built, mm.HookedModel(built.model), TracedModel(built.model)


@cache
def in_order(name: str) -> tuple[str, ...]:
    """The sites in the order they run (of a loop: in its first step)."""
    built, hooked, _ = both(name)
    fired: list[str] = []

    def note(site: str) -> Any:
        return lambda value: fired.append(site) or value.new_zeros(1)

    first = {
        s: [0] if hooked.sitemap[s].tower in hooked.sitemap.loops else None for s in hooked.sitemap.sites
    }
    hooked.run(built.inputs, read=[mm.Read(s, note(s), steps=first[s]) for s in first])
    return tuple(dict.fromkeys(fired))


def same(a: mm.Run, b: mm.Run) -> None:
    for kind in ("values", "grads"):
        one, other = getattr(a, kind), getattr(b, kind)
        assert list(one) == list(other)
        for site in one:
            torch.testing.assert_close(one[site], other[site], rtol=0, atol=0, equal_nan=True, msg=site)
    assert a.receipts == b.receipts
    assert a.rows == b.rows


def some(name: str) -> list[str]:
    """A few sites of every sort."""
    sites = list(both(name)[1].sitemap.sites)
    ends = (
        "hook_q",
        "hook_attn_scores",
        "hook_pattern",
        "hook_rot_k",
        "hook_z",
        "hook_resid_mid",
        "hook_resid_mid_cross",
        "hook_scale",
        "hook_normalized",
        "mlp.hook_pre",
        "hook_pos_embed",
        "resid_post",
        "hook_out",
    )
    return [matching[-1] for end in ends if (matching := [s for s in sites if s.endswith(end)])]


# -- the Lens ------------------------------------------------------------------------------------


@each_family
def test_every_site_read_is_bit_equal_to_the_hooked_model(name: str) -> None:
    built, hooked, traced = both(name)
    sites = list(hooked.sitemap.sites)
    one, other = hooked.run(built.inputs, read=sites), traced.run(built.inputs, read=sites)
    assert set(other.values) == set(sites)
    same(one, other)
    assert torch.equal(built.head(one.output), built.head(other.output))


@each_family
def test_edits_are_bit_equal_to_the_hooked_model(name: str) -> None:
    built, hooked, traced = both(name)
    for site in some(name):
        edits = [
            mm.Edit(site, lambda x: x * 1.5 - 0.25),
            mm.Edit(site, lambda x: x.flip(-1), rows=slice(0, 1)),
        ]
        one = hooked.run(built.inputs, read=[site], edit=edits)
        other = traced.run(built.inputs, read=[site], edit=edits)
        same(one, other)
        assert torch.equal(built.head(one.output), built.head(other.output)), site


@each_family
def test_gradients_are_bit_equal_to_the_hooked_model(name: str) -> None:
    built, hooked, traced = both(name)
    inputs = built.differentiable()
    if inputs is None:
        pytest.skip("its pipeline gives no tensor, so no gradient")

    def loss(output: Any) -> torch.Tensor:
        return built.head(output).double().pow(2).sum()

    sites = [s for s in some(name) if not s.startswith("vae")]  # Latents come before it.
    one = hooked.run(inputs, read=sites, grad_of=loss)
    other = traced.run(inputs, read=sites, grad_of=loss)
    assert set(other.grads) == set(sites)
    assert any(g.abs().max() > 0 for g in other.grads.values())
    same(one, other)


def test_steps_rows_and_positions_are_bit_equal_to_the_hooked_model() -> None:
    built, hooked, traced = both("stable_diffusion")
    pattern, text = "denoiser.blocks.0.cross_attn.hook_pattern", "text.blocks.1.hook_resid_post"
    read = [
        mm.Read(pattern, steps=[1], rows="cond"),
        mm.Read(text, rows="uncond"),
        mm.Read("denoiser.hook_out", reduce=lambda x: x.mean((2, 3))),
    ]
    pre = "denoiser.blocks.0.hook_resid_pre"
    edit = [
        mm.Edit(pre, lambda x: x * 2, steps=[0], rows="cond", positions=[3]),
        mm.Edit(text, lambda x: x + 1, rows="cond", positions=[0, 2]),
    ]
    same(hooked.run(built.inputs, read=read, edit=edit), traced.run(built.inputs, read=read, edit=edit))


def test_mistakes_raise_as_they_do_in_the_hooked_model() -> None:
    built, _, traced = both("clip")
    with pytest.raises(mm.MissingSiteError, match=r"vision\.blocks\.1\.attn\.hook_z"):
        traced.run(built.inputs, read=["vision.blocks.1.attn.hook_zz"])
    with pytest.raises(mm.InputError, match="no step 3"):
        traced.run(built.inputs, edit=[mm.Edit("vision.blocks.0.attn.hook_z", torch.relu, steps=[3])])
    with pytest.raises(ValueError, match="returned"):
        traced.run(built.inputs, edit=[mm.Edit("vision.blocks.0.attn.hook_z", lambda x: x[0])])


def test_a_generation_is_bit_equal_to_the_hooked_model() -> None:
    built, hooked, traced = both("llava")
    options = built.inputs | {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    last = mm.Read("language.blocks.1.hook_resid_post", lambda x: x[:, -1:])
    read = ["vision.blocks.1.hook_resid_post", last]
    edit = [mm.Edit("language.blocks.0.attn.hook_z", lambda x: x * 3, positions=[2, 11])]
    one = hooked.generate(**options, read=read, edit=edit)
    other = traced.generate(**options, read=read, edit=edit)
    assert torch.equal(one.output, other.output)
    same(one, other)


# -- the model is left as it is ------------------------------------------------------------------


@each_family
def test_a_traced_model_computes_what_it_did(name: str) -> None:
    built = tiny.CASES[name]()
    before = plain(built)
    traced = TracedModel(built.model)
    assert torch.equal(plain(built), before)
    hooks = count_hooks(built.model)
    with torch.no_grad(), traced.trace(**built.inputs, fn=traced._plain) as tracer:
        output = nnsight.save(tracer.result)
    assert torch.equal(built.head(output), before)
    site = next((s for s in traced.sitemap.sites if s.endswith("hook_pattern")), "vision.hook_embed")
    with pytest.raises(KeyboardInterrupt):
        traced.run(built.inputs, edit=[mm.Edit(site, interrupt)])
    assert not torch.overrides._get_current_function_mode_stack()
    assert count_hooks(built.model) == hooks
    assert torch.equal(plain(built), before)


def interrupt(value: torch.Tensor) -> torch.Tensor:
    raise KeyboardInterrupt


def test_fused_attention_runs_where_no_pattern_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    built, _, traced = both("clip")
    from mm_adapters.hooks import attention

    opened: list[int] = []
    take = attention._take_sdpa
    monkeypatch.setitem(
        attention.KERNELS,
        torch.nn.functional.scaled_dot_product_attention,
        lambda *a, **k: opened.append(1) or take(*a, **k),
    )
    with torch.no_grad(), traced.trace(**built.inputs):
        q = traced.site("vision.blocks.0.attn.hook_q").save()
        z = traced.site("vision.blocks.2.attn.hook_z").save()
    assert not opened
    with torch.no_grad(), traced.trace(**built.inputs):
        q = traced.site("vision.blocks.1.attn.hook_q")
        q.softmax(-1).sum()  # A block's own softmax is not the model's.
        pattern = traced.site("vision.blocks.1.attn.hook_pattern").save()
        z = traced.site("vision.blocks.1.attn.hook_z").save()
    assert len(opened) == 1
    assert pattern.shape == (2, 4, 5, 5)
    assert z.shape == (2, 5, 4, 8)


# -- sites inside a trace ------------------------------------------------------------------------


@each_family
def test_every_site_by_name_in_one_trace_is_bit_equal_to_a_run(name: str) -> None:
    built, hooked, traced = both(name)
    order = in_order(name)
    inputs = once(name, built)
    # The text's part of a pattern is not requested beside the whole: see the next test.
    order = [site for site in order if not site.endswith("hook_pattern_text")]
    run = hooked.run(inputs, read=list(order))
    with torch.no_grad(), traced.trace(**inputs):
        values = nnsight.save({})
        for site in order:
            values[site] = traced.site(site)
    assert set(values) == {s for s in hooked.sitemap.sites if not s.endswith("hook_pattern_text")}
    for site, value in values.items():
        expected = run[site]
        if hooked.sitemap[site].tower in hooked.sitemap.loops:
            expected = expected[0]
        assert torch.equal(value, expected), site


@pytest.mark.parametrize("name", ["stable_diffusion_3", "flux_transformer"])
def test_the_texts_part_of_a_joint_pattern_is_bit_equal_to_a_run(name: str) -> None:
    built, hooked, traced = both(name)
    once = {"num_inference_steps": 1, "guidance_scale": 1.0} if hooked.sitemap.model_record.loop else {}
    sites = [site for site in in_order(name) if site.endswith("hook_pattern_text")]
    run = hooked.run(built.inputs | once, read=sites)
    with torch.no_grad(), traced.trace(**built.inputs | once):
        values = nnsight.save({})
        for site in sites:
            values[site] = traced.site(site)
    for site in sites:
        expected = run[site][0] if hooked.sitemap.model_record.loop else run[site]
        assert torch.equal(values[site], expected), site


@each_family
def test_writing_into_a_site_and_setting_it_equal_an_edit(name: str) -> None:
    built, hooked, traced = both(name)
    fewest = {k: v for k, v in once(name, built).items() if not k.endswith("guidance_scale")}
    inputs = built.inputs | fewest
    for site in some(name):
        # Text is encoded twice under guidance; a block reads the first time.
        first = None if site.startswith("vae") else [0]
        expected = built.head(hooked.run(inputs, edit=[mm.Edit(site, lambda x: x * 1.5, steps=first)]).output)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), traced.trace(**inputs, fn=traced._plain) as tracer:
                traced.site(site)[:] *= 1.5
                written = nnsight.save(tracer.result)
            with torch.set_grad_enabled(grad), traced.trace(**inputs, fn=traced._plain) as tracer:
                traced.site(site, traced.site(site) * 1.5)
                assigned = nnsight.save(tracer.result)
            for output in (written, assigned):
                # With gradients a read site lies on the path, which rounds a residual otherwise.
                atol = 2e-6 * max(1.0, float(expected.abs().max())) if grad else 0
                torch.testing.assert_close(built.head(output), expected, rtol=0, atol=atol, msg=site)


def test_native_paths_and_sites_work_together() -> None:
    built, hooked, traced = both("clip")
    with torch.no_grad(), traced.trace(**built.inputs):
        native = traced.vision_model.encoder.layers[1].output.save()
        site = traced.site("vision.blocks.1.hook_resid_post").save()
        traced.vision_model.encoder.layers[2].self_attn.output[0][:] = 0
        after = traced.site("vision.blocks.2.hook_attn_out").save()
        out = traced.output.logits_per_image.save()
    assert torch.equal(native, site)
    assert torch.equal(after, torch.zeros_like(after))
    edit = mm.Edit("vision.blocks.2.hook_attn_out", torch.zeros_like)
    assert torch.equal(out, hooked.run(built.inputs, edit=[edit]).output.logits_per_image)


def test_a_site_is_asked_for_when_its_module_has_begun() -> None:
    built, hooked, traced = both("clip")
    names = [f"vision.blocks.1.{part}" for part in ("attn.hook_pattern", "hook_resid_mid", "ln2.hook_scale")]
    expected = hooked.run(built.inputs, read=names)
    layer = traced.vision_model.encoder.layers[1]
    with torch.no_grad(), traced.trace(**built.inputs):
        # Each is asked for only here, when what it is computed from has gone by.
        layer.self_attn.k_proj.output  # noqa: B018
        pattern = traced.site(names[0]).save()
        layer.self_attn.out_proj.output  # noqa: B018
        middle = traced.site(names[1]).save()
        layer.layer_norm2.input  # noqa: B018
        scale = traced.site(names[2]).save()
    assert torch.equal(pattern, expected[names[0]])
    assert torch.equal(middle, expected[names[1]])
    assert torch.equal(scale, expected[names[2]])


@pytest.mark.parametrize("name", ["clip", "llava", "stable_diffusion", "stable_diffusion_3"])
def test_what_is_passed_through_is_counted_as_what_is_read_and_nothing_is_kept_of_it(name: str) -> None:
    built, _, traced = both(name)
    engine, sites = traced.interleaver, traced.points.by_name

    def counted(read: list[str]) -> dict[str, int]:
        traced.run(built.inputs, read=read)
        return {n: engine.counts.get(p.location, 0) for n, p in sites.items()}

    served = counted(list(sites))
    assert counted([]) == served
    assert min(served.values()) > 0
    assert counted(list(sites)[::3]) == served
    keeps = [
        r.keep
        for module_hook in traced.points.module_hooks
        for r in module_hook.readers
        if isinstance(r, Always)
    ]
    assert keeps
    assert all(keep.kept.value is None for keep in keeps)


def test_a_module_that_is_passed_through_still_does_what_others_need() -> None:
    """Only what a module's input keeps for its own output alone may be left undone."""

    def location_state(keeps: tuple[Kept[Any], ...] = (), drops: tuple[Kept[Any], ...] = ()) -> LocationState:
        state = LocationState()
        keepers = [(SimpleNamespace(kept=kept), None) for kept in keeps]
        state.at_module = SimpleNamespace(keeps=keepers, drops=[*drops])  # type: ignore[assignment]
        return state

    own, other = Kept[Any](), Kept[Any]()
    own_output = location_state(drops=(own,))
    assert location_state(keeps=(own,)).feeds_only(own_output)
    assert not location_state(keeps=(own, other)).feeds_only(own_output)
    assert not location_state(keeps=(own,)).feeds_only(location_state(keeps=(other,), drops=(own,)))
    assert not location_state().feeds_only(location_state(drops=(other,)))
    assert not location_state(keeps=(own,), drops=(other,)).feeds_only(own_output)
    assert not location_state(keeps=(own,)).feeds_only(None)
    own_output.leaves = SimpleNamespace()  # type: ignore[assignment]
    assert not location_state(keeps=(own,)).feeds_only(own_output)


def test_an_envoy_of_a_site_is_read_assigned_and_cached() -> None:
    built, hooked, traced = both("clip")
    name = "vision.blocks.1.attn.hook_pattern"
    with torch.no_grad(), traced.trace(**built.inputs) as tracer:
        cache = tracer.cache(modules=[traced.envoy(name), traced.vision_model])
        before = traced.envoy(name).output
        traced.envoy(name).output = torch.full_like(before, 0.2)
        logits = traced.output.logits_per_image.save()
    assert torch.equal(cache[f"sites.{name}"].output, torch.full((2, 4, 5, 5), 0.2))
    expected = hooked.run(built.inputs, edit=[mm.Edit(name, lambda x: torch.full_like(x, 0.2))])
    assert torch.equal(logits, expected.output.logits_per_image)
    assert cache["model.vision_model"].output.pooler_output.shape == (2, 32)


def test_gradients_in_a_trace_equal_those_of_a_run() -> None:
    built, hooked, traced = both("clip")
    names = ["vision.blocks.1.attn.hook_pattern", "vision.blocks.2.hook_resid_mid"]
    run = hooked.run(built.inputs, read=names, grad_of=lambda o: o.logits_per_image.sum())
    with traced.trace(**built.inputs):
        pattern = traced.site(names[0])
        middle = traced.site(names[1])
        with traced.output.logits_per_image.sum().backward():
            late = middle.grad.save()
            early = pattern.grad.save()
    torch.testing.assert_close(early, run.grads[names[0]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(late, run.grads[names[1]], rtol=1e-5, atol=1e-6)


def test_an_edit_block_is_kept_and_run_again() -> None:
    built, hooked, traced = both("clip")
    name = "vision.blocks.1.attn.hook_z"
    with traced.edit() as (_, edited):
        edited.site(name)[:, :, 0] = 0

    def ablate(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, 1:]], 2)

    expected = hooked.run(built.inputs, edit=[mm.Edit(name, ablate)]).output.logits_per_image
    for _ in range(2):
        assert torch.equal(edited.run(built.inputs).output.logits_per_image, expected)
    assert torch.equal(traced.run(built.inputs).output.logits_per_image, plain(built))


def test_a_scan_gives_shapes_and_computes_nothing() -> None:
    built, hooked, traced = both("clip")
    run = hooked.run(built.inputs, read=list(in_order("clip")))
    with traced.scan(**built.inputs):
        shapes = nnsight.save({s: tuple(traced.site(s).shape) for s in in_order("clip")})
    assert shapes == {s: tuple(run[s].shape) for s in in_order("clip")}
    with traced.vision_model.scan(built.inputs["pixel_values"]):
        shape = nnsight.save(tuple(traced.site("vision.blocks.0.attn.hook_pattern").shape))
    assert shape == (2, 4, 5, 5)


# -- errors --------------------------------------------------------------------------------------


def test_a_site_asked_for_too_late_says_what_came_first() -> None:
    built, _, traced = both("clip")
    first, second = "vision.blocks.0.attn.hook_z", "vision.blocks.2.attn.hook_pattern"
    with pytest.raises(OutOfOrderError, match=rf"{first} had run already.*gone on to {second}"):
        with traced.trace(**built.inputs):
            traced.site(second).save()
            traced.site(first).save()
    with pytest.raises(OutOfOrderError, match="had run already"):
        with traced.trace(**built.inputs):
            traced.site("vision.blocks.2.attn.hook_z").save()
            traced.site("vision.blocks.2.attn.hook_pattern").save()
    native = r"layers\.0\.output had run already.*gone on to vision\.blocks\.2"
    with pytest.raises(OutOfOrderError, match=native):
        with traced.trace(**built.inputs):
            traced.site("vision.blocks.2.attn.hook_z").save()
            traced.vision_model.encoder.layers[0].output.save()
    assert torch.equal(traced.run(built.inputs).output.logits_per_image, plain(built))


def test_a_site_that_never_runs_and_one_that_is_none_are_errors() -> None:
    built, _, traced = both("clip")
    with pytest.raises(OutOfOrderError, match="never came by there"):
        with traced.trace(pixel_values=built.inputs["pixel_values"]):
            traced.site("text.blocks.0.hook_resid_post").save()
    with pytest.raises(mm.MissingSiteError, match="The nearest are"):
        with traced.trace(**built.inputs):
            traced.site("vision.blocks.0.attn.hook_zz").save()
    with pytest.raises(ValueError, match="only inside"):
        traced.site("vision.blocks.0.attn.hook_z")
    with pytest.raises(ValueError, match="was set to"):
        with traced.trace(**built.inputs):
            traced.site("vision.blocks.0.attn.hook_z", torch.zeros(1))


def test_remote_on_what_cannot_go_remote_is_an_error() -> None:
    built, _, traced = both("clip")
    for remote in (True, "local"):
        with pytest.raises(ValueError, match="whole models"):
            with traced.vision_model.trace(built.inputs["pixel_values"], remote=remote):
                traced.vision_model.output.save()
    with pytest.raises(ValueError, match="made from an object"):
        with traced.trace(**built.inputs, remote=True):
            traced.output.save()
    with pytest.raises(ValueError, match="whole models"):
        traced.text_model.encoder.session(remote=True)
    with pytest.raises(ValueError, match="made from an object"):
        both("llava")[2].generate(**both("llava")[0].inputs, remote=True)


def test_a_kernel_that_cannot_be_watched_is_an_error() -> None:
    built = tiny.clip()
    traced = TracedModel(built.model)
    attention = built.model.vision_model.encoder.layers[0].self_attn

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None

    attention.__dict__["forward"].state.body = lambda module, *a, **k: forward(*a, **k)
    with pytest.raises(mm.AttentionUnreachableError, match=r"vision\.blocks\.0\.attn\.hook_pattern"):
        with traced.trace(**built.inputs):
            traced.site("vision.blocks.0.attn.hook_pattern").save()
