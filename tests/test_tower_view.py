"""What methods ask of a tower, against the model's own."""

from __future__ import annotations

import pytest
import tiny
import torch

import mm_adapters as mm


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
