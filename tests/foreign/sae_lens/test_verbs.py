"""SAELens' verbs on its own HookedSAETransformer and on a tower of ours, on the same weights: equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from foreign.sae_lens.behaviours import EVERYWHERE, OF_TRANSCODERS, point
from foreign.sae_lens.pair import ROWS, WIDTHS, ours, sae_at, theirs, transcoder
from torch import Tensor

from mm_adapters import InputError, MissingSiteError

# Their model warns of hooks that a run takes off before a backward pass, and of SAEs it does not find.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return theirs(), ours()


@pytest.fixture
def both(models: tuple[Any, Any]) -> Any:
    yield models
    for model in models:
        model.reset_hooks(including_permanent=True)
        model.reset_saes()


def check_equal(theirs: Any, ours: Any, where: str = "") -> None:
    """The same structure, names and numbers."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6, msg=lambda text: f"{where}: {text}")
    elif isinstance(theirs, Mapping):
        assert set(ours) == set(theirs), where
        for name in theirs:
            check_equal(theirs[name], ours[name], f"{where}[{name!r}]")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            check_equal(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("site", WIDTHS)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_tower_does_as_saelens_own_model(both: Any, name: str, site: str) -> None:
    host, tower = both
    check_equal(EVERYWHERE[name](host, site), EVERYWHERE[name](tower, site))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("read", ["ln2.hook_normalized", "mlp.hook_in", "hook_resid_mid"])
@pytest.mark.parametrize("name", OF_TRANSCODERS)
def test_transcoders_too(both: Any, name: str, read: str, skip: bool) -> None:
    host, tower = both
    check_equal(OF_TRANSCODERS[name](host, read, skip), OF_TRANSCODERS[name](tower, read, skip))


def test_what_is_restated_is_enough() -> None:
    assert len(EVERYWHERE) + len(OF_TRANSCODERS) >= 40


def test_the_name_of_a_point_is_that_of_saelens_bridge(both: Any) -> None:
    _, tower = both
    for sae, site in ((sae_at("hook_mlp_out"), "hook_mlp_out"), (transcoder(), "hook_mlp_out")):
        name = tower.get_sae_hook_name(sae, "hook_sae_input")
        assert name == point(site, "input")
        assert name in dict(tower.run_with_cache_with_saes(ROWS, saes=[sae])[1])
        assert tower.root.get_sae_hook_name(prefixed(sae), "hook_sae_input") == f"language.{name}"


# ---- where SAELens goes on in silence, or says less ----------------------------------------------


def test_what_saelens_warns_of_is_an_error(both: Any) -> None:
    _, tower = both
    with pytest.raises(MissingSiteError, match="hook_resid_pots"):
        tower.add_sae(sae_like("blocks.0.hook_resid_pots"))
    with pytest.raises(MissingSiteError, match="hook_resid_pots"):
        tower.run_with_saes(ROWS, saes=[sae_like("blocks.0.hook_resid_pots")])
    with pytest.raises(MissingSiteError, match="no such site"):
        tower.reset_saes("no such site")
    tower.add_sae(sae_at("hook_mlp_out"))
    with pytest.raises(
        MissingSiteError, match=r"hook_resid_pre.*Attached: language\.blocks\.0\.hook_mlp_out"
    ):
        tower.reset_saes(["blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre"])
    assert list(tower.acts_to_saes) == ["blocks.0.hook_mlp_out"]


def test_names_of_points_that_are_not_there_are_errors(both: Any) -> None:
    _, tower = both
    with pytest.raises(MissingSiteError):
        tower.run_with_hooks(ROWS, fwd_hooks=[(point("hook_mlp_out"), print)])
    tower.add_sae(sae_at("hook_mlp_out"))
    with pytest.raises(MissingSiteError):
        tower.run_with_cache(ROWS, names_filter="blocks.0.hook_mlp_out.hook_sae_acts")
    with pytest.raises(MissingSiteError):
        tower.run_with_hooks(ROWS, fwd_hooks=[("blocks.1.hook_mlp_out.hook_sae_input", print)])


def test_heads_apart_are_for_a_site_with_heads(both: Any) -> None:
    _, tower = both
    sae = sae_at("attn.hook_z")
    sae.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"
    with pytest.raises(InputError, match="reshape_activations='none'"):
        tower.add_sae(sae)


def test_tokens_that_are_left_out_must_be_known(both: Any) -> None:
    _, tower = both
    import mm_adapters as mm

    clip = mm.load("tiny-clip")
    sae = sae_at("hook_mlp_out")
    sae.cfg.metadata.hook_name = "vision.blocks.0.hook_mlp_out"
    with pytest.raises(InputError, match="are no tokens"):
        clip.add_sae(sae, exclude_special_tokens=True)
    alone = mm.wrap(tower.root.wrapped).language
    with pytest.raises(InputError, match="no tokenizer"):
        alone.add_sae(sae_at("hook_mlp_out"), exclude_special_tokens=True)


def sae_like(site: str) -> Any:
    sae = sae_at("hook_resid_pre")
    sae.cfg.metadata.hook_name = site
    return sae


def prefixed(sae: Any) -> Any:
    metadata = sae.cfg.metadata
    metadata.hook_name = f"language.{metadata.hook_name}"
    metadata.hook_name_out = metadata.hook_name_out and f"language.{metadata.hook_name_out}"
    return sae
