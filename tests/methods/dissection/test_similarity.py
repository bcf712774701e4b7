"""Each kernel against its formula, written out slowly in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from methods_multimodal.dissection import similarity as kernels
from mm_adapters import InputError

N_IMAGES, N_UNITS, N_CONCEPTS = 160, 5, 150


@pytest.fixture
def seen() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    similarity = 0.2 + 0.05 * torch.randn(N_IMAGES, N_CONCEPTS, generator=made)
    return similarity, torch.randn(N_IMAGES, N_UNITS, generator=made)


def test_soft_wpmi_is_the_published_formula(seen: tuple[Tensor, Tensor]) -> None:
    similarity, activations = (x.double() for x in seen)
    likely = torch.softmax(10 * similarity, 1)
    slow = torch.zeros(N_UNITS, N_CONCEPTS, dtype=torch.float64)
    for unit in range(N_UNITS):
        order = sorted(range(N_IMAGES), key=lambda image: -float(activations[image, unit]))
        for rank, image in enumerate(order[:100]):
            p = 0.998 - rank / 100 * (0.998 - 0.97)
            slow[unit] += torch.log(1 + p * (likely[image] - 1) + 1e-7)
    slow -= torch.log(torch.exp(slow - slow.max(0).values).mean(0)) + slow.max(0).values
    found = kernels.soft_wpmi(*seen).double()
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5 * float(slow.abs().max()))


def test_a_concept_that_is_certain_does_not_overflow_the_products(seen: tuple[Tensor, Tensor]) -> None:
    similarity, activations = seen[0].clone(), seen[1]
    similarity[:, 7] = 1.0  # A thousand times as likely as all others together.
    found = kernels.soft_wpmi(similarity, activations, scale=100.0)
    assert torch.isfinite(found).all()
    alone = kernels.soft_wpmi(similarity, activations, scale=100.0, prior=0.0)
    torch.testing.assert_close(alone[:, 7], torch.zeros(N_UNITS), atol=1e-4, rtol=0)


def test_wpmi_is_the_published_formula(seen: tuple[Tensor, Tensor]) -> None:
    similarity, activations = (x.double() for x in seen)
    likely = torch.log(torch.softmax(2 * similarity, 1) + 1e-7)
    slow = torch.stack(
        [likely[activations[:, u].argsort(descending=True)[:28]].sum(0) for u in range(N_UNITS)]
    )
    slow = slow - 0.6 * (slow.logsumexp(0) - torch.tensor(float(N_UNITS)).log())
    torch.testing.assert_close(kernels.wpmi(*seen).double(), slow, rtol=1e-5, atol=1e-5)


def test_cosine_is_the_correlation(seen: tuple[Tensor, Tensor]) -> None:
    both = torch.corrcoef(torch.cat([seen[1], seen[0]], 1).double().T)
    torch.testing.assert_close(kernels.cosine(*seen).double(), both[:N_UNITS, N_UNITS:], rtol=1e-5, atol=1e-6)


def test_cosine_cubed_is_the_published_formula(seen: tuple[Tensor, Tensor]) -> None:
    similarity, activations = ((x.double() - x.double().mean(0)) ** 3 for x in seen)
    slow = torch.empty(N_UNITS, N_CONCEPTS, dtype=torch.float64)
    for unit in range(N_UNITS):
        for concept in range(N_CONCEPTS):
            a, b = activations[:, unit], similarity[:, concept]
            slow[unit, concept] = a @ b / (a.norm().clamp_min(1e-3) * b.norm().clamp_min(1e-3))
    torch.testing.assert_close(kernels.cosine_cubed(*seen).double(), slow, rtol=1e-5, atol=1e-6)


def test_rank_reorder_is_the_mean_over_random_orders(seen: tuple[Tensor, Tensor]) -> None:
    similarity, activations = seen
    found = kernels.rank_reorder(similarity, activations, top_share=0.1)
    top = activations[:, 2].argsort(descending=True)[:16]
    own = activations[top, 2].double()
    shuffles = [own[torch.randperm(16)] for _ in range(4000)]
    random = torch.stack([(own - other).abs().pow(3).mean() for other in shuffles]).mean()
    for concept in (0, 77):
        order = similarity[top, concept].argsort(descending=True)
        placed = torch.empty_like(own)
        placed[order] = own  # The strongest activation goes to the image most like the concept.
        wanted = -(own - placed).abs().pow(3).mean() / random / similarity[top, concept].mean().sqrt()
        assert float(found[2, concept]) == pytest.approx(float(wanted), rel=0.05)


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_every_kernel_finds_the_concept_that_a_unit_follows(name: str) -> None:
    made = torch.Generator().manual_seed(0)
    similarity = 0.2 + 0.05 * torch.randn(2000, 30, generator=made)
    planted = [3, 17, 22]
    activations = torch.stack([similarity[:, c] * 4 for c in planted], 1)
    activations = activations + 0.05 * torch.randn(activations.shape, generator=made)
    assert kernels.KERNELS[name](similarity, activations).argmax(1).tolist() == planted


def test_too_few_images_are_an_error(seen: tuple[Tensor, Tensor]) -> None:
    similarity, activations = seen
    with pytest.raises(InputError, match="top 100 of 60 images"):
        kernels.soft_wpmi(similarity[:60], activations[:60])
    with pytest.raises(InputError, match="top 5% of the images"):
        kernels.rank_reorder(similarity[:30], activations[:30])
