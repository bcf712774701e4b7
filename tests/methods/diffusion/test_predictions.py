"""What a sampler is given of the parts of guidance, and what of a run can be shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from unchecked import unchecked

import mm_adapters as mm
from methods_multimodal.diffusion._guidance import combine
from methods_multimodal.diffusion.denoising import StepReader, _first_timestep
from methods_multimodal.diffusion.pictures import decode
from mm_adapters import InputError
from mm_adapters.records import Guidance


def test_guidance_is_its_formula() -> None:
    g = torch.Generator().manual_seed(0)
    cond, uncond, image = (torch.randn(2, 3, 4, generator=g) for _ in range(3))
    numbers = {"guidance_scale": 3.0, "image_guidance_scale": 1.5, "rescale": 0.25}
    both = {"cond": cond, "uncond": uncond}
    cases: list[tuple[Any, ...]] = [
        (Guidance(), {"cond": cond}, cond),
        (Guidance(), both, uncond + 3 * (cond - uncond)),
        (Guidance(scale="guidance_scale|other"), both, uncond + 3 * (cond - uncond)),
        (Guidance(from_zero=True), both, uncond + 4 * (cond - uncond)),
        (Guidance(), both | {"image": image}, uncond + 3 * (cond - image) + 1.5 * (image - uncond)),
    ]
    for guidance, parts, expected in cases:
        torch.testing.assert_close(combine(guidance, parts, numbers), expected)
    guided = uncond + 3 * (cond - uncond)
    normed = combine(Guidance(keeps_norm=True), both, numbers)
    torch.testing.assert_close(normed.norm(dim=-1), cond.norm(dim=-1))
    torch.testing.assert_close(
        normed / normed.norm(dim=-1, keepdim=True), guided / guided.norm(dim=-1, keepdim=True)
    )
    drawn = combine(Guidance(rescale="rescale"), both, numbers)
    for row in range(2):
        spread = cond[row].std() / guided[row].std()
        torch.testing.assert_close(drawn[row], guided[row] * (0.75 + 0.25 * spread))
    assert torch.equal(combine(Guidance(rescale="another"), both, numbers), guided)


def test_guidance_that_cannot_be_put_together_is_refused() -> None:
    parts = {"cond": torch.zeros(1), "uncond": torch.zeros(1)}
    with pytest.raises(InputError, match=r"^Perturbed-attention guidance .* Run with pag_scale=0\.$"):
        combine(Guidance(), parts | {"perturbed": torch.zeros(1)}, {"guidance_scale": 2.0})
    with pytest.raises(InputError, match=r"^The run was guided by 'guidance_scale', and does not say"):
        combine(Guidance(), parts, {"image_guidance_scale": 2.0})
    with pytest.raises(InputError, match=r"^The run was guided by 'image_guidance_scale', and does not"):
        combine(Guidance(), parts | {"image": torch.zeros(1)}, {"guidance_scale": 2.0})


@pytest.mark.parametrize(
    ("n_steps", "n_frames", "kept"),
    [(1, 6, ()), (2, 6, (1,)), (3, 6, (1, 2)), (10, 3, (1, 5, 9)), (4, 1, (1,)), (7, 6, (1, 2, 3, 4, 5, 6))],
)
def test_the_first_step_is_not_kept(n_steps: int, n_frames: int, kept: tuple[int, ...]) -> None:
    reader = StepReader(n_steps, n_frames)
    assert reader.steps == kept
    assert bool(reader.reads()) == bool(kept)


def test_a_run_of_one_step_has_no_prediction() -> None:
    model = mm.HookedModel(tiny.stable_diffusion().model)
    nothing: Any = SimpleNamespace()
    with pytest.raises(InputError, match=r"^A run of one step has no prediction to keep"):
        unchecked(StepReader.step_predictions)(StepReader(1), model, nothing)


def test_a_loop_has_no_more_calls_than_its_sampler_has_times() -> None:
    sampler = SimpleNamespace(timesteps=range(5))
    assert [_first_timestep(sampler, n, "it") for n in (5, 4, 1)] == [0, 1, 4]
    with pytest.raises(InputError, match=r"^it called its denoiser at 6 steps, and its sampler has 5: some"):
        _first_timestep(sampler, 6, "it")


def test_packed_latents_are_decoded_as_the_pipeline_does() -> None:
    case = tiny.CASES["flux"]()
    model, pipe = mm.HookedModel(case.model), case.model
    rows, columns = 2, 3
    n_channels = pipe.vae.config.latent_channels
    packed = torch.randn(2, rows * columns, 4 * n_channels, generator=torch.Generator().manual_seed(1))
    side = 2 * pipe.vae_scale_factor
    latents = pipe._unpack_latents(packed, rows * side, columns * side, pipe.vae_scale_factor)
    with torch.no_grad():
        picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)[0]
    wanted = pipe.image_processor.postprocess(picture, output_type="pt")
    torch.testing.assert_close(decode(model, packed, grid=(rows, columns)), wanted)
    with pytest.raises(InputError, match=r"packs its latents into positions\. Give grid=\(rows, columns\)"):
        decode(model, packed)
