"""Data attribution by value, where one setting of an option hides a mistake: flows, checkpoints, scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_attribution import denoiser, pictures, pixel_unet
from torch.nn import functional as F

from methods_multimodal.data_attribution import (
    contrastive_task,
    denoiser_task,
    diffusion_examples,
    diffusion_task,
)
from methods_multimodal.data_attribution.diffusion import MEASURES, Schedule
from methods_multimodal.data_attribution.features import featurise, query_features
from methods_multimodal.data_attribution.pictures import read_pictures
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.retrieval import LinearMap, fit_linear_map
from methods_multimodal.data_attribution.scorers import Cosine, DataInf, scores, top_k
from methods_multimodal.data_attribution.task import batch_of
from methods_multimodal.data_attribution.trak import Trak
from mm_adapters import InputError, wrap
from mm_adapters.zoo.sd import N_TRAINING

# ---- flows and schedules -------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_loss_is_that_of_its_own_scheduler(shift: float) -> None:
    net, scheduler = pixel_unet(), FlowMatchEulerDiscreteScheduler(shift=shift)
    task = denoiser_task(net, scheduler, timesteps=[10, 700])
    clean = pictures(2)["latents"]
    batch = batch_of({"latents": clean}, 0, 2)
    rows = task.rows(batch, range(2))
    times = scheduler.timesteps.flip(0)[[10, 700]]  # The scheduler counts down.
    torch.testing.assert_close(rows["timestep"].view(2, 2), times.expand(2, 2))
    want = torch.zeros(2)
    for i in range(2):
        for k, time in enumerate(times):
            noisy = rows["noisy"].unflatten(0, (2, 2))[i, k][None]
            sigma = time / 1000
            noise = (noisy - (1 - sigma) * clean[i]) / sigma
            torch.testing.assert_close(scheduler.scale_noise(clean[i][None], time[None], noise), noisy)
            out = net(noisy, time[None], return_dict=False)[0]
            want[i] += (out - (noise - clean[i])).square().mean().detach() / 2
    torch.testing.assert_close(task.per_example(batch)["loss"].detach(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_the_loss_of_stable_diffusion_3_is_its_flows(engine: Any) -> None:
    pipe = tiny.CASES["stable_diffusion_3"]().model
    model = wrap(pipe, engine=engine)
    examples = diffusion_examples(model, torch.rand(2, 3, 16, 16), ["a cat", "a dog"])
    states, _, pooled, _ = pipe.encode_prompt(
        ["a cat", "a dog"], ["a cat", "a dog"], ["a cat", "a dog"], do_classifier_free_guidance=False
    )
    torch.testing.assert_close(examples["encoder_hidden_states"], states.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(examples["pooled_projections"], pooled.detach())
    task = diffusion_task(model, timesteps=[300])
    batch = batch_of(examples, 0, 2)
    rows = task.rows(batch, range(1))
    time = pipe.scheduler.timesteps.flip(0)[300]
    sigma = time / 1000
    noise = (rows["noisy"] - (1 - sigma) * examples["latents"]) / sigma
    with torch.no_grad():
        out = pipe.transformer(
            hidden_states=rows["noisy"],
            timestep=time.expand(2),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    want = (out - (noise - examples["latents"])).square().mean((1, 2, 3))
    torch.testing.assert_close(task.per_example(batch)["loss"].detach(), want, rtol=1e-3, atol=1e-4)


def test_timesteps_are_the_middles_of_equal_parts_and_are_scaled_for_the_denoiser() -> None:
    net = pixel_unet()
    task = denoiser_task(net, DDPMScheduler(num_train_timesteps=100), timesteps=4, timestep_scale=0.5)
    batch = batch_of(pictures(1), 0, 1)
    assert task.rows(batch, range(4))["timestep"].tolist() == [6.0, 18.5, 31.0, 43.5]
    plain = denoiser_task(net, DDPMScheduler(num_train_timesteps=100), timesteps=4)
    assert plain.rows(batch, range(4))["timestep"].tolist() == [12, 37, 62, 87]
    for wrong in (0, 101):
        with pytest.raises(InputError, match="cannot be spread over 100"):
            denoiser_task(net, DDPMScheduler(num_train_timesteps=100), timesteps=wrong)
    for some in ([5, 100], [-1, 5], []):
        with pytest.raises(InputError, match="Timesteps are 0 to 99"):
            denoiser_task(net, DDPMScheduler(num_train_timesteps=100), timesteps=some)
    flow = Schedule.of(FlowMatchEulerDiscreteScheduler(num_train_timesteps=10, shift=2.0), 0.1)
    plain_sigma = torch.arange(1, 11) / 10
    torch.testing.assert_close(flow.times, 2 * plain_sigma / (1 + plain_sigma))
    torch.testing.assert_close(flow.signal + flow.noise, torch.ones(10))


def test_each_measure_is_its_formula() -> None:
    net = pixel_unet()
    task = denoiser_task(net, DDPMScheduler(), timesteps=[400], measure=list(MEASURES))
    batch = batch_of(pictures(2), 0, 2)
    rows = task.rows(batch, range(1))
    with torch.no_grad():
        out = net(rows["noisy"], rows["timestep"]).sample
    n = out[0].numel()
    want = {
        "loss": (out - rows["target"]).pow(2).sum((1, 2, 3)) / n,
        "output_norm": out.pow(2).sum((1, 2, 3)) / n,
        "output_l2": out.pow(2).sum((1, 2, 3)).sqrt(),
        "output_l1": out.abs().sum((1, 2, 3)) / n,
        "output_max": torch.stack([one.abs().max() for one in out]),
        "output_mean": out.sum((1, 2, 3)) / n,
    }
    found = task.per_example(batch)
    for name, value in want.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-4, atol=1e-5)


def test_noises_of_one_timestep_differ_and_are_the_same_again() -> None:
    task = denoiser_task(pixel_unet(), DDPMScheduler(), timesteps=[10, 20], n_noises=3)
    batch = batch_of(pictures(1), 0, 1)
    rows = task.rows(batch, range(6))
    assert rows["timestep"].tolist() == [10, 10, 10, 20, 20, 20]
    assert len({round(float(noise.sum()), 5) for noise in rows["target"]}) == 6
    part = task.rows(batch, range(2, 5))
    assert torch.equal(part["target"], rows["target"][2:5])


# ---- encoding ------------------------------------------------------------------------------------


def test_latents_are_encoded_in_the_autoencoders_own_precision_and_shifted() -> None:
    pipe = tiny.CASES["stable_diffusion_3"]().model
    pipe.vae.to(torch.bfloat16)
    pipe.vae.register_to_config(shift_factor=0.25, scaling_factor=1.5)
    pixels = torch.rand(2, 3, 16, 16)
    examples = diffusion_examples(wrap(pipe), pixels, ["a cat", "a dog"])
    with torch.no_grad():
        mode = pipe.vae.encode((2 * pixels - 1).to(torch.bfloat16)).latent_dist.mode()
    want = (mode - 0.25) * 1.5
    assert torch.equal(examples["latents"], want)


def test_an_sdxls_examples_have_its_size_and_its_pooled_text() -> None:
    pipe = tiny.CASES["stable_diffusion_xl"]().model
    examples = diffusion_examples(wrap(pipe), torch.rand(2, 3, 16, 24), ["a cat", "a dog"], batch_size=1)
    states, _, pooled, _ = pipe.encode_prompt(["a cat", "a dog"], do_classifier_free_guidance=False)
    torch.testing.assert_close(examples["encoder_hidden_states"], states.detach())
    torch.testing.assert_close(examples["added_cond_kwargs.text_embeds"], pooled.detach())
    assert examples["added_cond_kwargs.time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    task = diffusion_task(wrap(pipe), timesteps=[100])
    batch = batch_of(examples, 0, 2)
    rows = task.rows(batch, range(1))
    with torch.no_grad():
        out = pipe.unet(
            rows["noisy"],
            100,
            encoder_hidden_states=states,
            added_cond_kwargs={
                "text_embeds": pooled,
                "time_ids": torch.tensor([[16.0, 24, 0, 0, 16, 24]] * 2),
            },
        ).sample
    want = (out - rows["target"]).square().mean((1, 2, 3))
    torch.testing.assert_close(task.per_example(batch)["loss"].detach(), want, rtol=1e-4, atol=1e-5)


def test_images_and_prompts_that_do_not_belong_together_are_refused() -> None:
    model = wrap(tiny.stable_diffusion().model)
    with pytest.raises(InputError, match="2 images and 1 prompts"):
        diffusion_examples(model, torch.rand(2, 3, 16, 16), ["a cat"])
    for bad in (torch.rand(2, 3, 16, 16) + 0.5, torch.rand(2, 3, 16, 16) - 0.5):
        with pytest.raises(InputError, match="in 0 to 1"):
            diffusion_examples(model, bad, ["a cat", "a dog"])


@pytest.mark.parametrize("number", ["1", "0", "-2", "x", str(N_TRAINING + 1)])
def test_a_number_of_training_pictures_that_cannot_be_is_refused(number: str) -> None:
    with pytest.raises(InputError, match=f"2 to {N_TRAINING} training pictures"):
        read_pictures(f"zoo:{number}")


def test_two_training_pictures_are_enough() -> None:
    assert len(read_pictures("zoo:2").captions) == 2


# ---- several checkpoints -------------------------------------------------------------------------

N, M = 9, 3


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Features of nine examples and of three queries, at three checkpoints."""
    points = [pixel_unet(seed).state_dict() for seed in (0, 1, 2)]
    task, every = denoiser(), pictures(N + M)["latents"]
    more: dict[str, Any] = {"projection": Projection("rademacher", 6), "checkpoints": points}
    store = featurise(task, {"latents": every[:N]}, tmp_path_factory.mktemp("store"), **more)
    asked = query_features(task, {"latents": every[N:], "index": torch.arange(50, 50 + M)}, **more)
    return store, asked


def features(checkpoints: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    store, asked = checkpoints
    rows = store.rows()
    return [(rows[f"loss@{k}"].double(), asked.columns[f"loss@{k}"].double()) for k in range(3)]


def inverse(phi: Any, damping: float, relative: bool) -> Any:
    kernel = phi.T @ phi
    term = damping * float(kernel.diagonal().mean()) if relative else damping
    return torch.linalg.inv(kernel + term * torch.eye(len(kernel)))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("leverage", [True, False])
def test_trak_is_the_mean_over_checkpoints(
    checkpoints: tuple[Any, Any], relative: bool, leverage: bool
) -> None:
    parts = []
    for phi, asked in features(checkpoints):
        solved = inverse(phi, 0.3, relative)
        part = asked @ solved @ phi.T
        parts.append(part / (1 - (phi @ solved * phi).sum(1)) if leverage else part)
    want = (parts[0] + parts[1] + parts[2]) / 3
    scorer = Trak(damping=0.3, relative=relative, leverage=leverage)
    torch.testing.assert_close(scores(scorer, *checkpoints), want.float(), rtol=1e-4, atol=1e-6)


def test_traks_weight_is_the_mean_over_checkpoints_of_each_examples_own(
    checkpoints: tuple[Any, Any],
) -> None:
    values = [checkpoints[0].rows()[f"value.loss@{k}"].double() for k in range(3)]
    assert not torch.equal(values[0], values[1])
    parts = [asked @ inverse(phi, 0.3, True) @ phi.T for phi, asked in features(checkpoints)]
    want = sum(parts) / 3 * (sum(3 * v + 1 for v in values) / 3)
    scorer = Trak(damping=0.3, weight=lambda value: 3 * value + 1)
    torch.testing.assert_close(scores(scorer, *checkpoints), want.float(), rtol=1e-4, atol=1e-6)


def test_cosines_and_influence_are_means_over_checkpoints(checkpoints: tuple[Any, Any]) -> None:
    cosines, influence, absolute = [], [], []
    for phi, asked in features(checkpoints):
        cosines.append(F.cosine_similarity(asked[:, None], phi[None], dim=-1))
        for parts, term in ((influence, 0.2 * float(phi.square().mean())), (absolute, 0.7)):
            # The mean of inverses: 1/n sum_i (g_i g_i' + term)^-1, each by itself.
            inverses = [torch.linalg.inv(torch.outer(g, g) + term * torch.eye(6)) for g in phi]
            parts.append(asked @ (sum(inverses) / N) @ phi.T)  # type: ignore[arg-type]
    for scorer, parts in (
        (Cosine(), cosines),
        (DataInf(damping=0.2), influence),
        (DataInf(damping=0.7, absolute=True), absolute),
    ):
        want = (parts[0] + parts[1] + parts[2]) / 3
        torch.testing.assert_close(scores(scorer, *checkpoints), want.float(), rtol=1e-3, atol=1e-5)


def test_the_lowest_scores_are_those_of_all(checkpoints: tuple[Any, Any]) -> None:
    every = scores(Cosine(), *checkpoints)
    lowest = top_k(Cosine(), *checkpoints, N, lowest=True)
    torch.testing.assert_close(lowest.values, every.sort(1).values)
    assert torch.equal(lowest.index, every.argsort(1))
    for k in (0, N + 1):
        with pytest.raises(InputError, match=f"no top {k} of {N}"):
            top_k(Cosine(), *checkpoints, k)


def test_a_kernel_without_an_inverse_is_refused(tmp_path: Path) -> None:
    task, every = denoiser(), pictures(4)["latents"]
    projection = Projection("rademacher", 8)  # More features than examples.
    store = featurise(task, {"latents": every[:3]}, tmp_path, projection=projection)
    asked = query_features(task, {"latents": every[3:], "index": torch.tensor([9])}, projection=projection)
    for damping in (0.0, -0.1):
        with pytest.raises(InputError, match="has no inverse"):
            scores(Trak(damping=damping), store, asked)


# ---- learned maps and temperatures ---------------------------------------------------------------


def test_probabilities_are_a_softmax_of_cosines_over_the_temperature() -> None:
    lots = torch.Generator().manual_seed(0)
    found = LinearMap(torch.randn(4, 6, generator=lots), 0.3)
    a, b = torch.randn(3, 6, generator=lots), torch.randn(5, 6, generator=lots)
    cosines = F.cosine_similarity((a @ found.weight.T)[:, None], (b @ found.weight.T)[None], dim=-1)
    want = torch.exp(cosines / 0.3)
    torch.testing.assert_close(found.probabilities(a, b), want / want.sum(1, keepdim=True))


@pytest.mark.parametrize("regularisation", [0.0, 0.1, 20.0])
def test_a_learned_map_is_that_of_the_loss_written_out(regularisation: float) -> None:
    lots = torch.Generator().manual_seed(1)
    a = F.normalize(torch.randn(6, 5, generator=lots), dim=1)
    b = F.normalize(torch.randn(7, 5, generator=lots), dim=1)
    sources = torch.rand(6, 7, generator=lots) < 0.3
    sources[:, 6] = False  # One example is nobody's source.
    sources[:, 0] |= ~sources.any(1)
    found = fit_linear_map(a, b, sources, contrast=0.2, regularisation=regularisation, rate=0.05, steps=6)
    weight = torch.eye(5, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=0.05)
    right = sources.double()
    for _ in range(6):
        cosines = F.cosine_similarity((a @ weight.T)[:, None], (b @ weight.T)[None], dim=-1) / 0.2
        kept = cosines[:, sources.any(0)]
        to_sources = right / right.sum(1, keepdim=True)
        to_queries = (right / right.sum(0)).T[sources.any(0)]
        loss = F.cross_entropy(cosines, to_sources.float()) + F.cross_entropy(kept.T, to_queries.float())
        loss = loss + regularisation * ((weight.T @ weight - torch.eye(5)) ** 2).sum() / 5
        adam.zero_grad()
        loss.backward()
        adam.step()
    torch.testing.assert_close(found.weight, weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 25.0])
def test_a_pairs_loss_has_the_scale_that_is_given(scale: float) -> None:
    case = tiny.clip()
    task = contrastive_task(wrap(case.model), case.inputs, scale=scale)
    got = task.per_example({**case.inputs, "index": torch.arange(2)})["loss"]
    out = case.model(**case.inputs)
    cosines = F.normalize(out.image_embeds, dim=-1) @ F.normalize(out.text_embeds, dim=-1).T
    for i in range(2):
        lines = [torch.cat([cosines[i, i, None], line]) * scale for line in (cosines[i], cosines[:, i])]
        want = torch.stack([torch.logsumexp(line, 0) - line[0] for line in lines]).mean()
        torch.testing.assert_close(got[i], want)
