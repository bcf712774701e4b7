"""States of a module in which what a site shows of it would not be what the site's name says."""

from __future__ import annotations

from torch import nn

from mm_adapters._errors import ModelStateError

_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def check_watchable(module: nn.Module, side: str, name: str, owner: nn.Module, tower: nn.Module) -> None:
    """Checks that a module's values can be read where its sites are.

    Args:
        module: Where a site's values pass.
        side: Its input, its output, or "inside" an attention.
        name: What `owner` calls it.
        owner: The module that holds it.
        tower: The tower it belongs to.

    Raises: ModelStateError if attention is sliced, projections are fused, the tower works in tiles or with
    a cache of its blocks.
    """
    if side == "inside" and hasattr(vars(module).get("processor"), "slice_size"):
        raise ModelStateError(
            f"Attention slicing is on: {type(module).__name__} attends to one slice of its heads after "
            "another, so no call has all of them. Switch it off: pipe.disable_attention_slicing()."
        )
    if vars(owner).get("fused_projections") and name in _PROJECTIONS and _is_fused(owner, name):
        raise ModelStateError(
            f"The projections are fused: {type(owner).__name__} does not call its {name}, so it gives no "
            "values. Undo it: pipe.unfuse_qkv_projections()."
        )
    if vars(tower).get("use_tiling"):
        raise ModelStateError(
            f"Tiling is on: {type(tower).__name__} works on one tile of the picture after another, so no "
            "call has all of it. Switch it off: pipe.vae.disable_tiling()."
        )
    if vars(tower).get("_cache_config") is not None:
        raise ModelStateError(
            f"A cache is on: {type(tower).__name__} leaves blocks out at some steps and takes what they gave "
            "before, so a site has no value there. Switch it off: pipe.transformer.disable_cache()."
        )


def _is_fused(attention: nn.Module, name: str) -> bool:
    across = getattr(attention, "is_cross_attention", False)
    return not (across and name == "to_q")  # Across, only keys and values are fused.
