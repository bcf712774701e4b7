"""The parts of the SAE measures that take seconds: which latents stand for colours, and where objects are."""

from __future__ import annotations

import torch
from PIL import Image

from mm_adapters.zoo import world
from tests.quality.sae import colour_latents, drawn


def test_the_latents_planted_for_colours_are_chosen_and_not_those_they_share() -> None:
    generator = torch.Generator().manual_seed(0)
    n, d, shared = 4000, 32, 8
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q[:9]
    colour = torch.randint(9, (n,), generator=generator)  # 8: no object here.
    truth = colour[:, None] == torch.arange(8)
    acts = torch.zeros(n, 9)
    # Latent 7 - c stands for colour c, misses a fifth of its objects and is active on the ground too (as
    # what a word writes is); the last is active on every object.
    there = truth.flip(1) & (torch.rand(n, 8, generator=generator) < 0.8)
    there |= (colour == 8)[:, None] & (torch.rand(n, 8, generator=generator) < 0.9)
    acts[:, :8] = there * (1 + torch.rand(n, 8, generator=generator))
    acts[:, shared] = 5.0 * (colour < 8)
    rows = acts @ directions + 0.01 * torch.randn(n, d, generator=generator)
    found = colour_latents(acts, rows, truth, directions)
    assert found.latent.tolist() == list(range(7, -1, -1))
    assert torch.equal(found.own[:, :shared], torch.eye(8, dtype=torch.bool).flip(1))
    assert not found.own[:, shared].any()
    # Where it is active: between 1 and 2.
    torch.testing.assert_close(found.level, torch.full((8,), 1.5), rtol=0.05, atol=0)


def test_an_object_is_found_where_the_world_put_it() -> None:
    for index in range(12):
        scene = world.scene(index, "test", seed=3, kind="one", solid=True, size="large")
        (mask,) = world.masks(scene)
        covered = torch.tensor(mask.reshape(16, 4, 16, 4).mean((1, 3))).flatten()
        found = drawn(Image.fromarray(world.render(scene)), 16)
        # A diamond's edge halves cells: those may go either way.
        assert bool(found[covered == 1].all())
        assert not bool(found[covered == 0].any())
