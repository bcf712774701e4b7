"""What heads do when held at their means, against plain edits and covariances; and the null of names."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import mm_adapters as mm
from methods_multimodal.text_explanations.decomposition import decompose
from methods_multimodal.text_explanations.head_effects import head_effects
from methods_multimodal.text_explanations.moments import Moments
from methods_multimodal.text_explanations.text_null import rotated_shares
from methods_multimodal.text_explanations.text_span import text_span
from methods_multimodal.text_explanations.vocabulary import Vocabulary

WORDS = Vocabulary(("a", "b", "c"), ("a", "b", "c"), ("x", "x", "y"))


def wrapped(name: str = "clip", engine: str = "hooked") -> Any:
    return mm.wrap(tiny.CASES[name]().model, tokenizer=tiny.letter_tokenizer(16), engine=engine)


def covariance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a - a.mean(0)) * (b - b.mean(0))).mean(0)


@pytest.mark.parametrize(("name", "engine"), [("clip", "hooked"), ("siglip", "hooked"), ("clip", "nnsight")])
def test_effects_are_those_of_plain_edits(name: str, engine: str) -> None:
    model, pixels = wrapped(name, engine), tiny.pixels(9)
    found = head_effects(model, pixels, WORDS, batch_size=4)
    plain = wrapped(name)
    texts = torch.nn.functional.normalize(plain.embed(text=list(WORDS.texts)).detach(), dim=-1)
    parts = decompose(plain, images=pixels, tokens="sum", batch_size=9)
    length = parts.length[:, None]
    own = parts.own / length @ texts.T
    tower = plain.towers["vision"]
    for layer in range(found.total.shape[0]):
        site = f"vision.blocks.{layer}.attn.hook_z"
        mean = plain.run({"pixel_values": pixels}, read=[site])[site].detach().mean(0)
        for head in range(found.total.shape[1]):

            def held(value: torch.Tensor, mean: Any = mean, head: int = head) -> torch.Tensor:
                return torch.cat([value[:, :, :head], mean[:, head : head + 1].expand(len(value), -1, 1, -1),
                                  value[:, :, head + 1 :]], 2)  # fmt: skip

            without = plain.run({"pixel_values": pixels}, read=[], edit=[mm.Edit(site, held)]).output
            change = (parts.own - tower.summary(without).detach()) / length
            direct = parts.heads[:, layer, 0, head] / length
            torch.testing.assert_close(
                found.total[layer, head], covariance(change @ texts.T, own), rtol=1e-3, atol=1e-7
            )
            torch.testing.assert_close(
                found.direct[layer, head], covariance(direct @ texts.T, own), rtol=1e-3, atol=1e-7
            )
            both = torch.stack([(x - x.mean(0)).flatten() for x in (change, direct)])
            cosine = torch.nn.functional.cosine_similarity(both[0], both[1], dim=0)
            assert float(found.correlation[layer, head]) == pytest.approx(float(cosine), abs=1e-3)
            size = both[0].square().sum() / both[1].square().sum()
            assert float(found.size[layer, head]) == pytest.approx(float(size), rel=1e-2)
    assert not torch.allclose(found.direct, found.total, rtol=0.1)  # Later layers do read these heads.


def test_what_is_lost_is_the_mean_over_a_group_s_texts() -> None:
    found = head_effects(wrapped(), tiny.pixels(5), WORDS)
    lost = found.lost(1, 2, "direct")
    assert lost["x"] == pytest.approx(float(found.direct[1, 2, :2].mean()))
    assert lost["y"] == pytest.approx(float(found.direct[1, 2, 2]))
    assert list(lost.values()) == sorted(lost.values(), reverse=True)
    best = max(lost, key=lambda group: lost[group])
    assert WORDS.groups[WORDS.texts.index(found.text(1, 2, "direct"))] == best
    with pytest.raises(mm.InputError, match="no path 'both'"):
        found.lost(0, 0, "both")


def test_effects_need_two_images() -> None:
    with pytest.raises(mm.InputError, match="1 is not enough"):
        head_effects(wrapped(), tiny.pixels(1), WORDS)


def test_a_planted_direction_beats_texts_turned_at_random_and_noise_does_not() -> None:
    rng = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(12, 40, generator=rng), dim=1)
    noise = torch.randn(500, 40, generator=rng)
    planted = noise + 6 * torch.randn(500, 1, generator=rng) * texts[3]
    for vectors, is_above in ((planted, True), (noise, False)):
        span = text_span(vectors, texts, 30, 1)
        null = rotated_shares(Moments.of(vectors), texts, 30, n=99)
        share = (1 + int((null >= span.variance_explained[0]).sum())) / 100
        assert (share == 0.01) is is_above, share
        if is_above:
            assert span.chosen == (3,)


def test_a_turned_vocabulary_explains_what_text_span_says_of_it() -> None:
    rng = torch.Generator().manual_seed(1)
    vectors = torch.randn(60, 2, 8, generator=rng) * torch.linspace(0.1, 3, 8)
    texts = torch.randn(5, 8, generator=rng)
    null = rotated_shares(Moments.of(vectors), texts, 6, n=3, seed=4)
    again = torch.Generator().manual_seed(4)
    for draw in range(3):
        q, r = torch.linalg.qr(torch.randn(8, 8, generator=again))
        turned = texts @ (q * r.diagonal().sign())
        torch.testing.assert_close(turned @ turned.T, texts @ texts.T, rtol=1e-4, atol=1e-4)
        for head in range(2):
            share = text_span(vectors[:, head], turned, 6, 1).variance_explained[0]
            torch.testing.assert_close(null[draw, head], share, rtol=1e-4, atol=1e-5)
