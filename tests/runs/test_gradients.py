"""A gradient is that of the whole value, or an error says why there is none."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from tests.runs.watched import ENGINES, first_tensor

SITES = {
    "clip": ("vision.blocks.1.hook_resid_post", "vision_model.encoder.layers.1"),
    "llava": ("language.blocks.1.hook_resid_post", "model.language_model.layers.1"),
    "qwen2_vl": ("language.blocks.0.hook_resid_post", "model.language_model.layers.0"),
}


def by_retain_grad(case: tiny.Case, path: str, scalar: Callable[[Any], Tensor]) -> Tensor:
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(first_tensor(output))
        kept[0].retain_grad()

    handle = attrgetter(path)(case.model).register_forward_hook(keep)
    scalar(case.model(**case.inputs)).backward()
    handle.remove()
    case.model.zero_grad()
    assert kept[0].grad is not None
    return kept[0].grad


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("rows", [[-1], slice(0, 1), "all", torch.tensor([0])])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_of_a_gradient_are_rows_of_the_whole(name: str, rows: Any, frozen: bool, engine: Any) -> None:
    case = tiny.CASES[name]()
    site, path = SITES[name]
    whole = by_retain_grad(case, path, lambda o: case.head(o).sum())
    case.model.requires_grad_(not frozen)
    model = mm.wrap(case.model, engine=engine)
    run = model.run(case.inputs, read=[mm.Read(site, rows=rows)], grad_of=lambda o: case.head(o).sum())
    right = {"all": whole}.get(rows) if isinstance(rows, str) else whole[rows]
    torch.testing.assert_close(run.grads[site], right, rtol=1e-5, atol=1e-7)
    assert float(run.grads[site].abs().max()) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_guidance_have_their_own_gradients(engine: Any) -> None:
    case = tiny.CASES["stable_diffusion"]()
    inputs, site = case.differentiable(), "denoiser.blocks.1.cross_attn.hook_z"
    assert inputs is not None
    model = mm.wrap(case.model, engine=engine)

    def gradient(rows: Any) -> Tensor:
        run = model.run(inputs, read=[mm.Read(site, rows=rows)], grad_of=lambda o: case.head(o).sum())
        return run.grads[site]

    whole = gradient("all")
    for part, right in zip(("uncond", "cond"), whole.chunk(2, 1), strict=True):
        torch.testing.assert_close(gradient(part), right, rtol=1e-5, atol=1e-7)
    assert float(whole.abs().amin((0, 2, 3, 4)).max()) >= 0
    assert all(float(part.abs().max()) > 0 for part in whole.chunk(2, 1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize(
    ("grad_of", "named"),
    [
        (lambda o: 1.0, "float"),
        (lambda o: None, "nothing"),
        (lambda o: "loss", "str"),
        (lambda o: first_tensor(next(iter(o.values()))).detach().sum(), "detached"),
        (lambda o: first_tensor(next(iter(o.values()))), "shape"),
        (lambda o: first_tensor(next(iter(o.values()))).sum() * 1j, "complex"),
        (lambda o: torch.ones((), requires_grad=True) * 3, "does not depend"),
    ],
)
def test_what_is_no_scalar_of_the_output_is_refused(name: str, engine: Any, grad_of: Any, named: str) -> None:
    case = tiny.CASES[name]()
    with pytest.raises(mm.InputError, match=named):
        mm.wrap(case.model, engine=engine).run(case.inputs, read=[SITES[name][0]], grad_of=grad_of)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SITES)
def test_gradients_are_the_same_whatever_mode_is_around(name: str, around: Any, engine: Any) -> None:
    case = tiny.CASES[name]()
    site, path = SITES[name]
    right = by_retain_grad(case, path, lambda o: case.head(o).sum())
    model = mm.wrap(case.model, engine=engine)
    with around():
        inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in case.inputs.items()}
        run = model.run(inputs, read=[site], grad_of=lambda o: case.head(o).sum())
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(run.grads[site], right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_site_that_does_not_matter_is_told_of(engine: Any) -> None:
    case = tiny.clip()
    model = mm.wrap(case.model, engine=engine)
    text, vision = "text.blocks.0.hook_resid_post", "vision.blocks.0.hook_resid_post"
    run = model.run(case.inputs, read=[text, vision], grad_of=lambda o: o.image_embeds.sum())
    assert run.unused == (text,)
    assert float(run.grads[text].abs().max()) == 0.0 < float(run.grads[vision].abs().max())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reduced_value_has_no_gradient_and_may_be_read_without(engine: Any) -> None:
    case = tiny.llava()
    model = mm.wrap(case.model, engine=engine)
    site, other = "language.blocks.1.hook_resid_post", "language.blocks.0.hook_resid_post"

    def mean(value: Tensor) -> Tensor:
        return value.mean(1)

    with pytest.raises(mm.InputError, match="grad=False"):
        model.run(case.inputs, read=[mm.Read(site, reduce=mean)], grad_of=lambda o: o.logits.sum())
    reads = [mm.Read(site, reduce=mean, grad=False), other]
    run = model.run(case.inputs, read=reads, grad_of=lambda o: o.logits.sum())
    assert list(run.grads) == [other]
    torch.testing.assert_close(run[site], model.run(case.inputs, read=[site])[site].mean(1))
    with pytest.raises(mm.InputError, match="nothing is"):
        model.run(case.inputs, grad_of=lambda o: o.logits.sum())
