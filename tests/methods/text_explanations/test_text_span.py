"""TextSpan: planted directions come first, and moments alone give the same choices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mm_adapters as mm
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.text_span import TextSpan, text_span


def published(data: Tensor, texts: Tensor, rank: int, n_texts: int) -> tuple[list[int], Tensor]:
    """Algorithm 1 as it is written, on the data: choose by standard deviation, project out, repeat."""
    _, _, vectors = torch.linalg.svd(data, full_matrices=False)
    basis = vectors[:rank]
    texts = texts @ basis.T @ basis
    mean = data.mean(0, keepdim=True)
    data, rebuilt, chosen = data - mean, mean.repeat(len(data), 1), []
    for _ in range(n_texts):
        chosen.append(int((data @ texts.T).std(0).argmax()))
        r = texts[chosen[-1]]
        along = torch.outer(data @ r / r.norm() ** 2, r)
        rebuilt, data = rebuilt + along, data - along
        texts = texts - torch.outer(texts @ r / r.norm() ** 2, r)
    return chosen, rebuilt


def head_data(n: int = 400, width: int = 48, d_head: int = 16, seed: int = 0) -> Tensor:
    """Like a head's output: in the span of its output matrix, with a mean."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d_head, generator=g) * torch.linspace(3, 0.2, d_head)
    z = z + torch.randn(d_head, generator=g)
    return z @ torch.randn(d_head, width, generator=g)


def some_texts(n: int = 200, width: int = 48, seed: int = 1) -> Tensor:
    texts = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + 0.5
    return texts / texts.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("rank", [6, 16])
def test_the_choices_and_the_reconstruction_are_the_published_algorithms(rank: int) -> None:
    data, texts = head_data(), some_texts()
    n_texts = min(rank, 12)
    chosen, rebuilt = published(data.double(), texts.double(), rank, n_texts)
    found = text_span(data, texts, rank, n_texts)
    assert list(found.chosen) == chosen
    assert found.reconstruction is not None
    assert (found.reconstruction - rebuilt).abs().max() <= 1e-4 * rebuilt.abs().max()
    left = (data.double() - rebuilt).square().sum() / (data - data.mean(0)).double().square().sum()
    assert float(found.variance_explained[-1]) == pytest.approx(1 - float(left), abs=1e-5)
    torch.testing.assert_close(found.reconstruct(data), found.reconstruction, rtol=1e-4, atol=1e-4)


def test_moments_alone_choose_the_same_texts_from_any_batches() -> None:
    data, texts = head_data(), some_texts()
    moments = Moments.none(48)
    for part in data.split([1, 99, 250, 50]):
        moments = moments.plus(part)
    whole, streamed = text_span(data, texts, 16, 12), text_span(moments, texts, 16, 12)
    assert streamed.chosen == whole.chosen
    assert streamed.reconstruction is None
    torch.testing.assert_close(streamed.reconstruct(data), whole.reconstruction, rtol=1e-4, atol=1e-4)


def test_moments_of_coordinates_in_a_basis_choose_the_same_texts() -> None:
    g = torch.Generator().manual_seed(3)
    z, basis = torch.randn(300, 16, generator=g) + 1, torch.randn(16, 48, generator=g)
    narrow = Moments.none(16, basis=basis).plus(z)
    assert narrow.outer.numel() == 16 * 16
    wide, texts = text_span(z @ basis, some_texts(), 80, 12), some_texts()
    assert text_span(narrow, texts, 80, 12).chosen == wide.chosen
    torch.testing.assert_close(text_span(narrow, texts, 80, 12).mean, wide.mean, rtol=1e-4, atol=1e-4)


def test_planted_directions_are_found_first_by_how_much_they_vary() -> None:
    g = torch.Generator().manual_seed(0)
    texts = torch.linalg.qr(torch.randn(48, 48, generator=g)).Q[:30]
    amounts = torch.zeros(500, 30)
    for size, text in ((5.0, 17), (3.0, 4), (2.0, 29)):
        amounts[:, text] = size * torch.randn(500, generator=g)
    data = amounts @ texts + 10 * texts[8] + 0.05 * torch.randn(500, 48, generator=g)
    found = text_span(data, texts, 40, 3, names=[f"t{i}" for i in range(30)])
    assert found.chosen == (17, 4, 29)  # Not 8: it is in every image, so it varies with none.
    assert found.names == ("t17", "t4", "t29")
    assert found.variance_explained[-1] > 0.98


def test_the_rank_is_never_above_the_numerical_rank() -> None:
    """With rank 80 on data of rank 16 the published code lets rounding noise choose."""
    data, texts = head_data(), some_texts()
    found = text_span(data, texts, 80, 16)
    assert found.rank == 16
    noisy = text_span(data * (1 + 1e-7 * torch.randn(data.shape)), texts, 80, 16)
    assert noisy.chosen == found.chosen
    few = text_span(data[:, :], texts, 80, 40)
    assert len(few.chosen) == 16  # Nothing is left to name after that.


def test_a_span_is_read_back_as_it_was_written(tmp_path) -> None:
    found = text_span(Moments.of(head_data()), some_texts(), 16, 3)
    back = TextSpan.load(found.save(tmp_path / "span.safetensors"))
    assert back.chosen == found.chosen
    assert torch.equal(back.directions, found.directions)
    assert back.reconstruction is None


def test_mistakes_are_said() -> None:
    with pytest.raises(mm.InputError, match="1 to 5"):
        text_span(head_data(), some_texts(5), 80, 20)
    with pytest.raises(mm.InputError, match="all the same"):
        text_span(torch.ones(10, 48), some_texts(), 16, 3)
    with pytest.raises(mm.InputError, match="at least two images"):
        text_span(torch.ones(1, 48), some_texts(), 16, 3)
