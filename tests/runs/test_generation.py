"""Values of a generation lie along the sequence, under every cache; what is reduced keeps calls apart."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import mm_adapters as mm
from mm_adapters import Call
from tests.runs.watched import ENGINES, first_tensor

MODELS = {
    "llava": "model.language_model.layers.1",
    "qwen2_vl": "model.language_model.layers.1",
    "llama_lm": "model.layers.1",
}
SITE = "language.blocks.1.hook_resid_post"
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
CACHES = [{}, {"use_cache": False}, {"cache_implementation": "static"}]


def generated(name: str, **options: Any) -> tuple[tiny.Case, Tensor, list[Tensor]]:
    """A case, its tokens by the library's own generation, and what the block gave at each call."""
    case = tiny.CASES[name]()
    calls: list[Tensor] = []
    block = case.model.get_submodule(MODELS[name])
    handle = block.register_forward_hook(lambda m, a, output: calls.append(first_tensor(output).clone()))
    tokens = case.model.generate(**case.inputs, **GREEDY, **options)
    handle.remove()
    return case, tokens, calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", CACHES, ids=["dynamic", "none", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_values_lie_along_the_sequence(name: str, options: dict[str, Any], engine: Any) -> None:
    case, tokens, calls = generated(name, **options)
    run = mm.wrap(case.model, engine=engine).generate(**case.inputs, **GREEDY, **options, read=[SITE])
    assert torch.equal(run.output, tokens)
    right = calls[-1] if "use_cache" in options else torch.cat(calls, 1)
    torch.testing.assert_close(run[SITE], right, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_reduced_keeps_calls_and_rows_apart(name: str, engine: Any) -> None:
    case, _, calls = generated(name)
    read = mm.Read(SITE, reduce=lambda value: value[:, -1])
    run = mm.wrap(case.model, engine=engine).generate(**case.inputs, **GREEDY, read=[read])
    torch.testing.assert_close(run[SITE], torch.stack([call[:, -1] for call in calls]), rtol=0, atol=0)
    assert run.calls[SITE] == tuple(Call(i, 0) for i in range(4))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pattern_has_all_keys_and_zeros_for_those_to_come(engine: Any) -> None:
    case, _, _ = generated("llava")
    site = "language.blocks.1.attn.hook_pattern"
    pattern = mm.wrap(case.model, engine=engine).generate(**case.inputs, **GREEDY, read=[site])[site]
    n = pattern.shape[-1]
    assert pattern.shape[-2] == n
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    assert float(pattern.triu(1).abs().max()) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", CACHES, ids=["dynamic", "none", "static"])
def test_positions_mean_the_same_under_every_cache(options: dict[str, Any], engine: Any) -> None:
    case, _, calls = generated("llava")
    n = calls[0].shape[1]
    edit = mm.Edit(SITE, torch.zeros_like, positions=[1, n + 1])
    run = mm.wrap(case.model, engine=engine).generate(
        **case.inputs, **GREEDY, **options, read=[SITE], edit=[edit])  # fmt: skip
    zeroed = (run[SITE] == 0).all(-1).all(0)
    assert zeroed.nonzero().flatten().tolist() == [1, n + 1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("positions", "error"), [([-1], mm.InputError), ([1, 500], mm.EditNeverFiredError)])
def test_positions_that_a_generation_does_not_come_to(engine: Any, positions: Any, error: Any) -> None:
    case = tiny.CASES["llava"]()
    edit = mm.Edit(SITE, torch.zeros_like, positions=positions)
    with pytest.raises(error, match=str(positions[-1])):
        mm.wrap(case.model, engine=engine).generate(**case.inputs, **GREEDY, edit=[edit])
