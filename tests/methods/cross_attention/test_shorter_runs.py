"""Word maps of runs that take a share of their steps, and of pipelines put together in other ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as df
import pytest
import tiny
import tiny_diffusion as td
import torch

import mm_adapters as mm
from methods_multimodal.cross_attention.word_maps import word_maps
from methods_multimodal.diffusion.step_count import fewest_steps

OPTIONS = {"prompt": "a cat", "output_type": "latent", "seed": 0}
PICTURE = {"image": td.noise(1, 3, 16, 16).sigmoid()}
JOINT = {"height": 16, "width": 16, "max_sequence_length": 6}


def of(cls: Any, case: Callable[[], tiny.Case], **left_out: Any) -> Any:
    pipe = cls(**case().model.components | left_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable_diffusion": (lambda: td.image_to_image().model, PICTURE),
    "xl": (lambda: of(df.StableDiffusionXLImg2ImgPipeline, tiny.stable_diffusion_xl), PICTURE),
    "flux": (lambda: of(df.FluxImg2ImgPipeline, td.flux), PICTURE | JOINT),
    "sd3": (lambda: of(df.StableDiffusion3Img2ImgPipeline, td.stable_diffusion_3), PICTURE | JOINT),
}


def count_steps(pipe: Any, run: Callable[[], Any]) -> int:
    calls: list[None] = []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        run()
    finally:
        handle.remove()
    return len(calls)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_fewest_steps_are_those_that_run_or_one_less(name: str) -> None:
    make, more = PIPELINES[name]
    pipe = make()
    model = mm.wrap(pipe)
    for n_steps, strength in ((2, 0.6), (5, 0.3), (5, 1.0), (7, None)):
        options = OPTIONS | more | {"num_inference_steps": n_steps}
        options |= {} if strength is None else {"strength": strength}
        ran = count_steps(pipe, lambda options=options: model.run(options))
        fewest = fewest_steps(model, options)
        assert fewest is not None
        assert fewest <= ran <= fewest + 1


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_strength_that_leaves_no_step_is_refused(name: str, engine: str) -> None:
    make, more = PIPELINES[name]
    model = mm.wrap(make(), engine=engine)
    with pytest.raises(mm.InputError, match=r"of 4 steps leaves none|cannot be called so"):
        model.run(OPTIONS | more | {"num_inference_steps": 4, "strength": 0.0})
    with pytest.raises(mm.InputError, match=r"strength=1\.5"):
        model.run(OPTIONS | more | {"num_inference_steps": 4, "strength": 1.5})


@pytest.mark.parametrize(("start", "end"), [(None, 0.3), (None, 0.8), (0.5, None), (0.4, 0.9)])
def test_a_part_of_the_denoising_is_counted(start: float | None, end: float | None) -> None:
    make, more = PIPELINES["xl"]
    pipe = make()
    model, options = mm.wrap(pipe), OPTIONS | more | {"num_inference_steps": 10}
    options |= {"denoising_start": start} if start is not None else {"strength": 1.0}
    options |= {} if end is None else {"denoising_end": end}
    ran = count_steps(pipe, lambda: model.run(options))
    fewest = fewest_steps(model, options)
    assert fewest is not None
    assert abs(ran - fewest) <= 1
    assert int(fewest / 2) < ran  # The step that is read for spreading.


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_spread_maps_of_a_short_run_are_those_of_its_own_step(strength: float) -> None:
    """The affinity is a plain hook's softmax of queries and keys, at the step that lies in the middle."""
    pipe = td.image_to_image().model
    model = mm.wrap(pipe)
    options = OPTIONS | PICTURE | {"num_inference_steps": 10, "strength": strength}
    maps, _ = word_maps(model, options, spread=True)
    heat = maps.heat("cat", recipe="spread")
    assert torch.isfinite(heat).all()
    assert heat.std() > 0
    attentions = [m for name, m in pipe.unet.named_modules() if name.endswith("attn1")]
    seen: dict[Any, list[torch.Tensor]] = {m: [] for one in attentions for m in (one.to_q, one.to_k)}
    handles = [m.register_forward_hook(lambda m, a, o: seen[m].append(o.detach())) for m in seen]
    given = {k: v for k, v in options.items() if k != "seed"}
    pipe(**given, generator=torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    step, patterns = int(10 * strength) // 2, []
    for one in attentions:
        # Of the guided rows the second half is the conditional one.
        q, k = (
            seen[m][step][1:].unflatten(-1, (one.heads, -1)).transpose(1, 2) for m in (one.to_q, one.to_k)
        )
        patterns.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1))
    most = max(p.shape[-1] for p in patterns)
    right = torch.stack([p for p in patterns if p.shape[-1] == most]).mean(0)
    torch.testing.assert_close(maps.affinity, right, rtol=1e-5, atol=1e-6)


def test_a_refiner_has_the_words_of_its_second_encoder() -> None:
    pipe = of(df.StableDiffusionXLImg2ImgPipeline, tiny.stable_diffusion_xl)
    both = mm.wrap(pipe).layout(text="a cat")["text_2"]
    refiner = of(
        df.StableDiffusionXLImg2ImgPipeline, tiny.stable_diffusion_xl, text_encoder=None, tokenizer=None
    )
    model = mm.wrap(refiner)
    assert "text" not in model.towers
    assert model.layout(text="a cat")["text_2"] == both
