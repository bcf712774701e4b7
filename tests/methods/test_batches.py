"""What a method gives does not depend on how many rows it runs at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_attribution
import torch
from torch import Tensor

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from methods_multimodal import cross_attention as ca
from methods_multimodal import data_attribution as da
from methods_multimodal import text_explanations as te
from methods_multimodal.core.embed import embed

N = 5
PIXELS = tiny.pixels(N)
CASES = [ca.Case("a cat", "cat", "a dog", "dog", seed) for seed in (0, 1)]
CASES += [ca.Case("an ox by a cat", "ox", "an ant by a cat", "ant", 3)]
DRAWN = {"num_inference_steps": 2, "height": 16, "width": 16}


@cache
def clip() -> mm.HookedModel:
    return mm.HookedModel(tiny.clip().model)


@cache
def pipeline() -> mm.HookedModel:
    return mm.HookedModel(tiny.stable_diffusion().model)


def directions() -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(4, 16, generator=torch.Generator().manual_seed(2)), dim=1
    )


def redness(pictures: Tensor) -> Tensor:
    return (pictures[:, 0] - pictures[:, 1:].mean(1)).mean((-1, -2))


def featurised(batch: int, folder: Path) -> Any:
    task = tiny_attribution.denoiser()
    made = da.featurise(
        task, tiny_attribution.pictures(N), folder, projection=da.Projection(dim=16), batch_size=batch,
        progress=False,
    )  # fmt: skip
    asked = da.query_features(
        task, tiny_attribution.pictures(3), projection=da.Projection(dim=16), batch_size=batch
    )
    return made, asked


def unlearned(batch: int, folder: Path) -> Any:
    task = tiny_attribution.denoiser()
    examples = tiny_attribution.pictures(N) | {"index": torch.arange(N)}
    queries = {"latents": tiny_attribution.pictures(7)["latents"][5:], "index": torch.arange(2)}
    fisher = da.fisher_diagonal(task, examples, batch_size=batch)
    scores = da.unlearning_scores(task, examples, queries, fisher=fisher, batch_size=batch, max_rows=batch)
    return fisher, scores


def traced(method: Callable[..., Any], batch: int, *parts: Any) -> Any:
    return method(pipeline(), CASES, redness, *parts, batch=batch, options=DRAWN)


def collected(batch: int, folder: Path) -> Any:
    site = "vision.blocks.1.hook_resid_post"
    store = mm_sae.collect(
        clip(),
        [site],
        [{"pixel_values": row} for row in PIXELS],
        folder,
        batch_size=batch,
        progress=False,
    )
    return store.rows(0, len(store))


PARTS = [ca.Part(layers=(1,), steps=(1,)), ca.Part()]
CALLS: dict[str, Callable[[int, Path], Any]] = {
    "embed": lambda b, _: embed(clip(), PIXELS, "vision", batch_size=b),
    "decompose": lambda b, _: te.decompose(clip(), images=PIXELS, batch_size=b),
    "decompose, summed": lambda b, _: te.decompose(clip(), images=PIXELS, tokens="sum", batch_size=b),
    "second_order": lambda b, _: te.second_order(clip(), images=PIXELS, layer=1, batch_size=b),
    "segment": lambda b, _: te.segment(clip(), PIXELS, directions(), batch_size=b),
    "segment, chosen": lambda b, _: te.segment(
        clip(), PIXELS, directions(), torch.tensor([[0, 1], [2, 3], [3, 1], [1, 1], [0, 2]]), batch_size=b
    ),
    "segment, moved": lambda b, _: te.segment(clip(), PIXELS, directions(), shifts=2, batch_size=b),
    "featurise": featurised,
    "unlearning": unlearned,
    "patch_words": lambda b, _: traced(ca.patch_words, b, PARTS),
    "knock_out_words": lambda b, _: traced(ca.knock_out_words, b, PARTS),
    "ablate_heads": lambda b, _: traced(ca.ablate_heads, b, [ca.Part(layers=(0,), heads=(1,)), ca.Part()]),
    "restore_layers": lambda b, _: traced(ca.restore_layers, b),
    "restore_text": lambda b, _: traced(ca.restore_text, b),
    "collect": collected,
}  # fmt: skip


DRAWING = ("patch_words", "knock_out_words", "ablate_heads", "restore_layers", "restore_text")


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """The tensors and plain values in a record, by their place."""
    if isinstance(value, Tensor):
        return {where: value}
    if is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in leaves(one, f"{where}.{name}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, one in enumerate(value) for k, v in leaves(one, f"{where}.{i}").items()}
    return {where: value} if isinstance(value, str | int | float | bool | None) else {}


@pytest.mark.parametrize("name", CALLS)
def test_small_batches_give_what_one_gives(name: str, tmp_path: Path) -> None:
    whole = leaves(CALLS[name](100, tmp_path / "whole"))
    assert any(isinstance(value, Tensor) and value.numel() for value in whole.values())
    for batch in (4,) if name in DRAWING else (2, 1):  # A drawing holds four pictures at least.
        small = leaves(CALLS[name](batch, tmp_path / str(batch)))
        assert small.keys() == whole.keys()
        for place, wanted in whole.items():
            if isinstance(wanted, Tensor):
                torch.testing.assert_close(
                    small[place], wanted, rtol=2e-4, atol=2e-5, msg=lambda m, p=place: f"{p}: {m}"
                )
            else:
                assert small[place] == wanted, place


def test_a_batch_of_nothing_is_refused() -> None:
    for batch in (0, -1):
        with pytest.raises(mm.InputError, match=f"at least one row, not {batch}"):
            te.decompose(clip(), images=PIXELS, batch_size=batch)
