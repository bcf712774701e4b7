"""A key-value cache is found by whichever name a version of transformers gives its argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import mm_adapters as mm
from mm_adapters.inputs.cache_argument import cache_name, cache_of
from mm_adapters.runs.clock import Clock


def filled(n: int) -> Any:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 3, n, 4), torch.zeros(2, 3, n, 4), 0)
    return cache


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_positions_before_a_call_are_counted(name: str) -> None:
    counter = Clock()
    counter.tick(None, (), {"input_ids": torch.zeros(2, 1), name: filled(7), "other": None})
    assert counter.n_before == 7
    assert cache_name({name}.__contains__) == name
    assert cache_of({"input_ids": 1, "cache": None, "past_key_values": None}) is None


def test_a_call_goes_on_behind_a_cache_and_an_edit_counts_its_positions() -> None:
    model = mm.load("tiny-llava")
    tower, site = model.language, "language.blocks.1.hook_resid_post"
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    whole = model.run({"input_ids": tokens}, read=[site]).values[site]
    cache = DynamicCache()
    with torch.no_grad():
        tower(tokens[:, :4], past_key_values=cache)
        assert cache.get_seq_length() == 4
        kept: list[torch.Tensor] = []
        hook = (site.removeprefix("language."), lambda v, hook: kept.append(v))
        tower.run_with_hooks(tokens[:, 4:], past_key_values=cache, fwd_hooks=[hook])
    torch.testing.assert_close(kept[0], whole[:, 4:], rtol=1e-4, atol=1e-5)
