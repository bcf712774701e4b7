"""Retrieval: exact neighbours, features a model's own code gives, and a map that is learned."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import mm_adapters as mm
from methods_multimodal.data_attribution.retrieval import (
    LinearMap,
    fit_linear_map,
    fit_temperature,
    image_features,
    nearest,
    nearest_other,
    pixel_features,
    similarity,
)
from mm_adapters import InputError, zoo

faiss = pytest.importorskip("faiss", reason="the optional part `attribution`")


def test_the_nearest_are_those_of_all_cosines_however_examples_arrive() -> None:
    lots = torch.Generator().manual_seed(0)
    queries, examples = torch.randn(7, 12, generator=lots), torch.randn(300, 12, generator=lots)
    whole, parts = nearest(queries, examples, 9), nearest(queries, iter(examples.split(64)), 9)
    wanted = similarity(queries, examples).topk(9, dim=1)
    assert torch.equal(whole.examples, wanted.indices)
    assert torch.equal(parts.examples, wanted.indices)
    torch.testing.assert_close(whole.similarity, wanted.values)
    with pytest.raises(InputError, match="301 nearest of 300"):
        nearest(queries, examples, 301)


def test_image_features_are_the_models_own() -> None:
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor

    from mm_adapters.zoo import path

    samples = zoo.sample_images()
    pictures = [Image.open(samples[name]).convert("RGB") for name in ("green_triangle", "yellow_star")]
    from torchvision.transforms.functional import to_tensor

    found = image_features(mm.load("tiny-clip"), torch.stack([to_tensor(p) for p in pictures]))
    model = CLIPModel.from_pretrained(path("tiny-clip"), dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(path("tiny-clip"))
    with torch.no_grad():
        own = model.get_image_features(**processor(images=pictures, return_tensors="pt"))
    own = getattr(own, "pooler_output", own)
    torch.testing.assert_close(found, normalize(own, dim=1), rtol=1e-4, atol=1e-5)


def test_a_copy_is_the_nearest_other() -> None:
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[3] = images[11]
    alike = nearest_other(pixel_features(images))
    assert set(alike.topk(2).indices.tolist()) == {3, 11}
    assert alike[3] == pytest.approx(1.0, abs=1e-5)


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features in which 4 of 24 directions say the source, and louder ones are chance."""
    lots = torch.Generator().manual_seed(seed)
    kinds = torch.randn(8, 4, generator=torch.Generator().manual_seed(99))
    a, b = (torch.randint(8, (n,), generator=lots) for _ in range(2))
    noise = 2 * torch.randn(2, n, 20, generator=lots)
    queries, examples = torch.cat([kinds[a], noise[0]], 1), torch.cat([kinds[b], noise[1]], 1)
    return queries, examples, a[:, None] == b[None]


def test_a_learned_map_finds_sources_that_plain_cosines_miss_on_new_queries() -> None:
    learned = fit_linear_map(*planted(150, 0), rate=1e-2)
    queries, examples, sources = planted(150, 1)
    first = similarity(queries, examples).argmax(1)
    mapped = similarity(learned(queries), learned(examples)).argmax(1)
    rows = torch.arange(150)
    before, after = sources[rows, first].float().mean(), sources[rows, mapped].float().mean()
    assert before < 0.4
    assert after > 0.8
    assert learned.probabilities(queries, examples).sum(1).allclose(torch.ones(150), atol=1e-5)


def test_the_temperature_is_the_one_that_drew_the_sources() -> None:
    lots = torch.Generator().manual_seed(0)
    cosines = torch.rand(3000, 30, generator=lots) * 2 - 1
    drawn = torch.multinomial((cosines / 0.2).softmax(1), 1, generator=lots)
    sources = torch.zeros(3000, 30, dtype=torch.bool).scatter(1, drawn, True)
    assert fit_temperature(cosines, sources) == pytest.approx(0.2, rel=0.08)


def test_a_map_is_kept_on_disk_and_needs_a_source_a_query(tmp_path) -> None:
    learned = LinearMap(torch.randn(4, 6), 0.3)
    again = LinearMap.load(learned.save(tmp_path / "map.safetensors"))
    assert torch.equal(again.weight, learned.weight)
    with pytest.raises(InputError, match="at least one a query"):
        fit_linear_map(torch.randn(2, 3), torch.randn(4, 3), torch.zeros(2, 4, dtype=torch.bool))
