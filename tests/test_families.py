"""The contract every family keeps, checked on a tiny random model of each."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from itertools import islice
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import mm_adapters as mm
from mm_adapters.records.spec import ModelRecord, Tower
from mm_adapters.sites.lookup import lookup


@cache
def case(name: str) -> tuple[tiny.Case, mm.HookedModel]:
    built = tiny.CASES[name]()
    return built, mm.HookedModel(built.model)


def plain(built: tiny.Case) -> torch.Tensor:
    """The wrapped model's own output, by its own call."""
    inputs = dict(built.inputs)
    if "seed" in inputs:
        inputs["generator"] = torch.Generator().manual_seed(inputs.pop("seed"))
    with torch.no_grad():
        return built.head(built.model(**inputs))


def one_step(name: str, built: tiny.Case) -> dict[str, int]:
    """What a pipeline takes for a loop of one step.

    Or of two: the prior's scheduler divides by the steps less one, and text adds little to Kandinsky's first.
    """
    step = "num_inference_steps"
    return {step: 2 if name in ("kandinsky_prior", "kandinsky_3") else 1} if step in built.inputs else {}


def modules(model: Any) -> list[nn.Module]:
    roots = (
        [model]
        if isinstance(model, nn.Module)
        else [m for m in model.components.values() if isinstance(m, nn.Module)]
    )
    return [m for root in roots for m in root.modules()]


def count_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules(model))


each_family = pytest.mark.parametrize("name", tiny.CASES)


@each_family
def test_unhooked_forward_equals_the_original_bit_for_bit(name: str) -> None:
    built, model = case(name)
    with torch.no_grad():
        assert torch.equal(built.head(model(**built.inputs)), plain(built))


@each_family
def test_every_site_fires_with_the_axes_it_declares(name: str) -> None:
    built, model = case(name)
    run = model.run(built.inputs, read=list(model.sitemap.sites))
    assert set(run.values) == set(model.sitemap.sites)
    for site in model.sitemap:
        value = run[site.name]
        assert value.ndim == len(site.axes) + (site.tower in model.sitemap.loops), site
        for size, axis in zip(reversed(value.shape), reversed(site.axes), strict=False):
            if "=" in axis:
                assert size == int(axis.partition("=")[2]), site


@each_family
def test_reading_everything_leaves_the_output_within_1e_5(name: str) -> None:
    built, model = case(name)
    reference = plain(built)
    output = built.head(model.run(built.inputs, read=list(model.sitemap.sites)).output)
    assert (output - reference).abs().max() <= 1e-5 * max(1.0, float(reference.abs().max()))


@each_family
def test_what_was_read_is_not_changed_afterwards(name: str) -> None:
    built, model = case(name)
    kept = model.run(built.inputs, read=list(model.sitemap.sites))
    then = model.run(built.inputs, read=[mm.Read(s, torch.clone) for s in model.sitemap.sites])
    for site in model.sitemap.sites:
        torch.testing.assert_close(kept[site], then[site], rtol=0, atol=0, equal_nan=True, msg=site)


@each_family
def test_every_site_is_causal_and_leaves_nothing_behind(name: str) -> None:
    built, model = case(name)
    built = replace(built, inputs=built.inputs | one_step(name, built))
    reference = plain(built)
    before = count_hooks(built.model)
    for site in model.sitemap.sites:
        noise = torch.Generator().manual_seed(5)
        edit = mm.Edit(site, lambda x, g=noise: x * 1.3 + torch.randn(x.shape, generator=g))
        run = model.run(built.inputs, edit=[edit])
        moved = (built.head(run.output) - reference).abs().max()
        if any(fnmatch(site, glob) for glob in built.off_path):
            assert moved == 0, f"{site} is used after all"
        else:
            assert moved > 1e-5, f"{site} moved the output by {float(moved)}"
        assert run.receipts[0].fired > 0
        assert run.receipts[0].moved > 0, site
    assert count_hooks(built.model) == before
    assert torch.equal(plain(built), reference)


@each_family
def test_writing_into_a_value_is_an_edit(name: str) -> None:
    built, model = case(name)
    ends = (
        "hook_resid_mid",
        "hook_resid_mid_cross",
        "hook_normalized",
        "hook_scale",
        "hook_pattern",
        "hook_pattern_text",
        "hook_z",
        "hook_branch",
        "hook_pre",
        "hook_resid_post",
    )
    for end in ends:
        site = next((s for s in model.sitemap.sites if s.endswith(end)), None)
        if site is None or any(fnmatch(site, glob) for glob in built.off_path):
            continue

        def write(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
            value[..., ::2] *= 1.5
            return value

        def give(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
            return write(value.clone())

        with torch.no_grad():
            written, given = (
                built.head(model.run_with_hooks(**built.inputs, fwd_hooks=[(site, fn)]))
                for fn in (write, give)
            )
        torch.testing.assert_close(written, given, rtol=1e-5, atol=1e-6, msg=site)
        assert not torch.equal(given, plain(built)), site


@each_family
def test_sites_are_listed_in_the_order_they_run(name: str) -> None:
    built, model = case(name)
    fired: list[str] = []

    def note(site: str):
        return lambda value: fired.append(site) or value.new_zeros(1)

    reads = [
        mm.Read(s, note(s), steps=[0] if model.sitemap[s].tower in model.sitemap.loops else None)
        for s in model.sitemap.sites
    ]
    model.run(built.inputs, read=reads)
    for tower in model.tower_names:
        ran = list(dict.fromkeys(s for s in fired if s.startswith(f"{tower}.")))
        for stack in model.sitemap.towers[tower].stacks:
            prefix = f"{tower}.{stack}."
            layers = [int(s.removeprefix(prefix).split(".")[0]) for s in ran if s.startswith(prefix)]
            assert layers == sorted(layers)
        own = [s for s in ran if ".resnets." not in s and ".blocks." in s]
        listed = [s for s in model.sitemap.sites if s in set(own)]
        # Which of the three projections is made first is the library's, and changes with it.
        ran_, listed_ = ([re.sub("hook_[qkv]$", "hook_qkv", s) for s in names] for names in (own, listed))
        assert list(dict.fromkeys(ran_)) == list(dict.fromkeys(listed_))


@each_family
def test_pattern_rows_sum_to_one_and_are_the_softmax_of_the_scores(name: str) -> None:
    built, model = case(name)
    patterns = [s for s in model.sitemap.sites if s.endswith("hook_pattern")]
    scores = [s.replace("hook_pattern", "hook_attn_scores") for s in patterns]
    run = model.run(built.inputs, read=[*patterns, *scores])
    for pattern, score in zip(patterns, scores, strict=True):
        torch.testing.assert_close(run[pattern].sum(-1), torch.ones_like(run[pattern].sum(-1)))
        torch.testing.assert_close(run[score].softmax(-1), run[pattern], rtol=1e-5, atol=1e-6)


@each_family
def test_nothing_in_the_model_is_replaced(name: str) -> None:
    built = tiny.CASES[name]()
    classes = [type(m) for m in modules(built.model)]
    forwards = [m.__dict__.get("forward") for m in modules(built.model)]
    hooks = count_hooks(built.model)
    keys = [list(m.state_dict()) for m in modules(built.model)[:1]]
    model = mm.HookedModel(built.model)
    model.run_with_cache(**built.inputs)
    assert [type(m) for m in modules(built.model)] == classes
    assert [m.__dict__.get("forward") for m in modules(built.model)] == forwards
    assert [list(m.state_dict()) for m in modules(built.model)[:1]] == keys
    # transformers 5 puts its own recorders on at a model's first forward; none of the rest is ours.
    fresh = tiny.CASES[name]()
    plain(fresh)
    assert count_hooks(built.model) == max(hooks, count_hooks(fresh.model))


@each_family
def test_an_exception_inside_a_hook_leaves_the_model_clean(name: str) -> None:
    built, model = case(name)
    reference, before = plain(built), count_hooks(built.model)

    def fail(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        raise KeyboardInterrupt

    patterns = [s for s in model.sitemap.sites if s.endswith("hook_pattern")]
    for site in (*patterns[-1:], next(iter(model.sitemap.sites))):
        with pytest.raises(KeyboardInterrupt):
            model.run(built.inputs, edit=[mm.Edit(site, fail)])
        with pytest.raises(KeyboardInterrupt):
            model.run_with_hooks(**built.inputs, fwd_hooks=[(site, fail)])
    assert count_hooks(built.model) == before
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(plain(built), reference)


@each_family
def test_gradients_at_sites_equal_finite_differences(name: str) -> None:
    built, model = case(name)
    names = list(model.sitemap.sites)
    of_blocks = [s for s in names if s.endswith(("hook_resid_mid", "hook_pattern", "hook_q"))]
    sites = (of_blocks or names)[-3:]  # A convolutional network has no such blocks.
    inputs = built.differentiable()
    if inputs is None:
        pytest.skip("its pipeline gives no tensor, so no gradient")
    run = model.run(inputs, read=sites, grad_of=lambda o: built.head(o).double().pow(2).sum())
    for site in sites:
        grad = run.grads[site]
        assert grad.shape == run[site].shape
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(7))
        predicted, shift_in_loop = (
            (grad.double() * direction).sum(),
            model.sitemap[site].tower in model.sitemap.loops,
        )
        tolerance = 0.03 * max(abs(predicted), 0.05 * grad.norm())
        error = torch.inf
        for step in (1e-3, 1e-2):  # The first suffers from rounding, the second from curvature.
            if error <= tolerance:
                break
            slopes = []
            for sign in (1, -1):
                shift = sign * step * direction
                rows = iter(shift.flatten(0, 1) if shift_in_loop else shift)
                add = lambda x, r=rows: x + torch.stack([*islice(r, len(x))])  # noqa: E731
                moved = model.run(inputs, edit=[mm.Edit(site, add)])
                slopes.append(built.head(moved.output).double().pow(2).sum())
            error = abs((slopes[0] - slopes[1]) / (2 * step) - predicted)
        assert error <= tolerance, site


def _records() -> list[Tower | ModelRecord]:
    """Those of models that this transformers has."""
    return [r for r in mm.families.records() if not r.name.startswith(tiny.tiny_vlm.LACKING)]


def _wrapped_alone() -> list[mm.HookedModel]:
    """Towers that open_clip wraps, without the model around them."""
    alone = tiny.CASES["open_clip_timm_siglip"]().model.visual, tiny.CASES["open_clip_hf_text"]().model.text
    return [mm.HookedModel(tower) for tower in alone]


def test_every_registered_class_has_a_tiny_model() -> None:
    built = [case(name)[1] for name in tiny.CASES]
    used = {t.record.name for m in built for t in m.sitemap.towers.values()}
    mounted = {m.sitemap.model_record.name for m in built}
    mounted |= {model.sitemap.model_record.name for model in _wrapped_alone()}
    for record in _records():
        known = used if isinstance(record, Tower) else mounted
        assert record.name in known, f"No tiny model for {record.name}; add one to tests/tiny.py."


def test_every_part_a_record_names_is_in_some_tiny_model() -> None:
    seen: dict[str, set[str]] = {}
    for name in tiny.CASES:
        for tower in case(name)[1].sitemap.towers.values():
            parts = [p for blocks in tower.parts.values() for block in blocks for p in block]
            found = {*parts, *tower.before, *tower.after}
            seen.setdefault(tower.record.name, set()).update(found)
    for record in _records():
        if isinstance(record, Tower):
            named = {p for stack in record.stacks.values() for p in stack.parts}
            missing = (named | {*record.before, *record.after}) - seen[record.name]
            assert not missing, f"{record.name}: no tiny model has {sorted(missing)}; is a path wrong?"


def test_every_place_a_record_mounts_a_tower_at_is_in_some_tiny_model() -> None:
    models = [case(name)[1] for name in tiny.CASES] + _wrapped_alone()
    there = {mounted.mount.path for model in models for mounted in model.sitemap.towers.values()}
    named = {m.path for r in _records() if isinstance(r, ModelRecord) for m in r.towers.values()}
    assert named - there <= {"visual", "text"}  # open_clip's.


def test_a_class_has_one_record() -> None:
    record = next(r for r in mm.families.records() if isinstance(r, ModelRecord))
    with pytest.raises(ValueError, match="already belongs to"):
        mm.register(ModelRecord("another", "contrastive", record.classes, {}))


def test_an_unknown_class_says_what_to_write() -> None:
    with pytest.raises(
        mm.UnknownFamilyError, match=r"torch:Linear[\s\S]*import .*register\n[\s\S]*register\(\s*ModelRecord"
    ):
        lookup(nn.Linear(2, 2))
