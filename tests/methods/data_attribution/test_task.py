"""What a task measures, against formulas written out."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from tiny_attribution import pixel_unet
from torch.nn import functional as F

from methods_multimodal.data_attribution import (
    contrastive_task,
    denoiser_task,
    diffusion_examples,
    diffusion_task,
    module_task,
)
from methods_multimodal.data_attribution.task import batch_of
from mm_adapters import InputError, wrap


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_what_the_scheduler_trains(predicts: str) -> None:
    net, scheduler = pixel_unet(), DDPMScheduler(prediction_type=predicts)
    task = denoiser_task(net, scheduler=scheduler, timesteps=[10, 700], n_noises=2)
    clean = torch.randn(2, 3, 8, 8)
    batch = batch_of({"latents": clean}, 0, 2)
    rows = task.rows(batch, range(4))
    expected = []
    for row in range(8):
        t = torch.tensor([[10, 10, 700, 700][row % 4]])
        one, eps = clean[row // 4][None], None
        a = scheduler.alphas_cumprod[t]
        eps = (rows["noisy"][row][None] - a.sqrt() * one) / (1 - a).sqrt()
        noisy = scheduler.add_noise(one, eps, t)
        target = {"epsilon": eps, "v_prediction": scheduler.get_velocity(one, eps, t), "sample": one}[
            predicts
        ]
        expected.append((net(noisy, t).sample - target).square().mean())
    got = task.per_example(batch)["loss"]
    torch.testing.assert_close(got, torch.stack(expected).view(2, 4).mean(1), rtol=1e-4, atol=1e-5)


def test_noise_belongs_to_the_example_and_not_to_its_batch() -> None:
    task = denoiser_task(
        pixel_unet(), scheduler=DDPMScheduler(), timesteps=3, measure=["loss", "output_norm"]
    )
    examples = {"latents": torch.randn(5, 3, 8, 8)}
    together = task.per_example(batch_of(examples, 0, 5))
    for i in range(5):
        alone = task.per_example(batch_of(examples, i, i + 1), max_rows=1)
        for name in ("loss", "output_norm"):
            torch.testing.assert_close(alone[name][0], together[name][i], rtol=1e-4, atol=1e-6)
    rows = task.rows(batch_of(examples, 0, 5), range(3))["target"]
    assert len({float(r.sum()) for r in rows}) == 15
    one = denoiser_task(pixel_unet(), scheduler=DDPMScheduler(), timesteps=3, noise="one")
    shared = one.rows(batch_of(examples, 0, 5), range(3))["target"].unflatten(0, (5, 3))
    assert (shared == shared[:1]).all()


def test_a_trajectory_brings_its_own_timesteps() -> None:
    net, scheduler = pixel_unet(), DDPMScheduler()
    latents = torch.randn(2, 3, 8, 8)
    fixed = denoiser_task(net, scheduler=scheduler, timesteps=[5, 90])
    own = denoiser_task(net, scheduler=scheduler, timesteps=None)
    values = fixed.per_example(batch_of({"latents": latents}, 0, 2))["loss"]
    parts = [
        own.per_example({"latents": latents, "timestep": torch.full((2,), t), "index": torch.arange(2)})[
            "loss"
        ]
        for t in (5, 90)
    ]
    torch.testing.assert_close(values, torch.stack(parts).mean(0))
    trajectory = denoiser_task(net, scheduler=scheduler, timesteps=None, n_own=2)
    batch = {
        "latents": torch.stack([latents, latents], 1),
        "timestep": torch.tensor([[5, 90], [5, 90]]),
        "index": torch.arange(2),
    }
    torch.testing.assert_close(trajectory.per_example(batch)["loss"], values)
    with pytest.raises(InputError, match="n_own is how many"):
        trajectory.per_example({**batch, "timestep": torch.tensor([5, 90]), "latents": latents})


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_a_pipeline_encodes_its_own_examples(engine: str) -> None:
    pipe = tiny.stable_diffusion().model
    lens = wrap(pipe, engine=engine)
    pixels = torch.rand(2, 3, 16, 16)
    examples = diffusion_examples(lens, pixels, ["a cat", "a dog"])
    states = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
    latents = pipe.vae.encode(2 * pixels - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(examples["encoder_hidden_states"], states.detach())
    torch.testing.assert_close(examples["latents"], latents.detach())
    task = diffusion_task(lens, timesteps=2, parameters="cross_attention_kv")
    assert task.parameters
    assert all("attn2.to_k" in n or "attn2.to_v" in n for n in task.parameters)
    bare = denoiser_task(pipe.unet, pipe.scheduler, timesteps=2).per_example(batch_of(examples, 0, 2))
    assert torch.equal(task.per_example(batch_of(examples, 0, 2))["loss"], bare["loss"])
    with pytest.raises(InputError, match="needs a prompt"):
        diffusion_examples(lens, pixels)


def test_a_contrastive_pair_is_measured_among_fixed_others() -> None:
    case = tiny.clip()
    task = contrastive_task(wrap(case.model), case.inputs, scale=10.0, measure=["loss", "similarity"])
    got = task.per_example({**case.inputs, "index": torch.arange(2)})
    out = case.model(**case.inputs)
    image, text = F.normalize(out.image_embeds, dim=-1), F.normalize(out.text_embeds, dim=-1)
    for i in range(2):
        to_text = torch.cat([text[i : i + 1], text]) @ image[i] * 10
        to_image = torch.cat([image[i : i + 1], image]) @ text[i] * 10
        zero = torch.tensor(0)
        loss = (F.cross_entropy(to_text, zero) + F.cross_entropy(to_image, zero)) / 2
        torch.testing.assert_close(got["loss"][i], loss)
        torch.testing.assert_close(got["similarity"][i], image[i] @ text[i])


def test_any_module_and_any_checkpoint() -> None:
    net = torch.nn.Linear(3, 2)
    other = {k: torch.randn_like(v) for k, v in net.state_dict().items()}
    task = module_task(net, {"sum": lambda call, b: call(b["x"]).sum(1)}, "weight")
    x = torch.randn(4, 3)
    batch = batch_of({"x": x}, 0, 4)
    torch.testing.assert_close(task.per_example(batch)["sum"], net(x).sum(1))
    expected = F.linear(x, other["weight"], other["bias"]).sum(1)
    torch.testing.assert_close(task.per_example(batch, other)["sum"], expected)


def test_what_cannot_be_measured_is_said_first() -> None:
    net = pixel_unet()
    with pytest.raises(InputError, match="scheduler="):
        denoiser_task(net, None)
    with pytest.raises(InputError, match="no measure 'l0'; there is loss"):
        denoiser_task(net, scheduler=DDPMScheduler(), measure="l0")
    with pytest.raises(InputError, match="Timesteps are 0 to 999"):
        denoiser_task(net, scheduler=DDPMScheduler(), timesteps=[1000])
    with pytest.raises(InputError, match="No parameter of UNet2DModel is 'lora'"):
        denoiser_task(net, scheduler=DDPMScheduler(), parameters="lora")
    with pytest.raises(InputError, match="one length"):
        batch_of({"x": torch.zeros(2), "y": torch.zeros(3)}, 0, 1)
    with pytest.raises(InputError, match="does not fit"):
        module_task(net, {"f": lambda call, b: b["x"]}).weights({"conv_in.weight": torch.zeros(1)})
