"""Shares against every subset, against a metric that knows one modality only, and after a kill."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

import mm_adapters as mm
from methods_multimodal.probing import ModalityShares, modality_shares, shapley
from mm_adapters.zoo import measures, world


def items(n: int = 2) -> list[dict[str, Any]]:
    scenes = [world.scene(i, "validation", kind="one") for i in range(n)]
    pictures = measures.images_of(scenes)
    return [
        {"images": [p], "text": [f"a {s.things[0].shape}"]} for p, s in zip(pictures, scenes, strict=True)
    ]


def test_values_from_subsets_are_the_mean_over_all_orders() -> None:
    scores = torch.randn(16, dtype=torch.float64)
    slow = torch.zeros(4, dtype=torch.float64)
    for order in permutations(range(4)):
        shown = 0
        for player in order:
            slow[player] += (scores[shown | 1 << player] - scores[shown]) / 24
            shown |= 1 << player
    torch.testing.assert_close(shapley(scores), slow)


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_sampled_values_are_those_of_every_subset_within_their_error(engine: str) -> None:
    model: Any = mm.load("tiny-clip", engine=engine)
    exact = modality_shares(model, items(), n_orders=None, side=2)
    sampled = modality_shares(model, items(), n_orders=512, side=2)
    for record in (exact, sampled):
        torch.testing.assert_close(
            torch.stack([record.of(i)[1].sum() for i in range(2)]), record.full - record.empty
        )
    # The model's own logit, when all is shown.
    logit = float(model.run(items()[0]).output.logits_per_image[0, 0])
    assert float(exact.full[0]) == pytest.approx(logit, rel=1e-5)
    away = (sampled.values - exact.values).abs() / sampled.error.clamp_min(1e-3)
    assert float(away.max()) < 4
    assert float(exact.error.max()) == 0
    torch.testing.assert_close(sampled.text_share, exact.text_share, atol=0.08, rtol=0)


def test_a_metric_of_one_modality_has_all_of_its_share_there() -> None:
    model = mm.load("tiny-clip")
    whole = {"text": 1.0, "image": 0.0}
    for modality, share in whole.items():

        def metric(output: Any, modality: str = modality) -> torch.Tensor:
            return getattr(output, f"{modality}_embeds")[:, 0]

        record = modality_shares(model, items(), metric=metric, n_orders=2, side=2)
        torch.testing.assert_close(
            record.text_share, torch.full((2,), share, dtype=torch.float64), atol=1e-4, rtol=0
        )
    for i, item in enumerate(items()):
        n_words = len(model.layout(text=item["text"])["text"].positions("word"))
        assert float(record.text_players[i]) == n_words / (n_words + 4)


def test_a_vlm_shares_out_the_logit_of_its_own_answer() -> None:
    model = mm.load("tiny-llava")
    asked = {**items(1)[0], "text": ["<image>\nquestion: what colour? answer:"]}
    record = modality_shares(model, [asked], n_orders=2, side=2)
    logits = model.run(asked).output.logits[0, -1]
    assert float(record.full[0]) == pytest.approx(float(logits.max()), rel=1e-5)
    names, values = record.of(0)
    assert {"colour", "square 1, 1"} <= set(names)
    assert float(values.sum()) == pytest.approx(float(record.full[0] - record.empty[0]), rel=1e-6)


def test_a_call_that_was_killed_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mm.load("tiny-clip")
    whole = modality_shares(model, items(), n_orders=2, side=2)
    run, calls = type(model).run, []

    def killed(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*args, **options)

    monkeypatch.setattr(type(model), "run", killed)
    with pytest.raises(KeyboardInterrupt):
        modality_shares(model, items(), n_orders=2, side=2, folder=tmp_path / "work")
    again = modality_shares(model, items(), n_orders=2, side=2, folder=tmp_path / "work")
    assert len(calls) == 3
    assert torch.equal(again.values, whole.values)
    back = ModalityShares.load(again.save(tmp_path / "shares.safetensors"))
    assert back.names == again.names


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"n_orders": 3}, mm.InputError, "orders in pairs"),
        ({"n_orders": None, "side": 8}, mm.InputError, "subsets"),
        ({"items": []}, mm.InputError, "give inputs"),
        ({"side": 0}, mm.InputError, "at least one square"),
        (
            {"items": [{"images": measures.images_of([world.scene(0)]), "text": ["a", "b"]}]},
            mm.InputError,
            "2 rows",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_runs(
    changed: dict[str, Any], error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mm.load("tiny-clip")
    monkeypatch.setattr(type(model), "run", lambda *args, **options: pytest.fail("it ran"))
    call: dict[str, Any] = {"items": items(1), "n_orders": 2, **changed}
    with pytest.raises(error, match=match):
        modality_shares(model, **call)
