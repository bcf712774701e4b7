"""Sites read off nnsight's own values, for a service's sandbox that has none of our code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_adapters._errors import AttentionUnreachableError, MissingSiteError
from mm_adapters.hooks.module_hooks import first_tensor, key_of_tensor
from mm_adapters.inputs.cache_argument import cache_of
from mm_adapters.records.spec import Input, Output

if TYPE_CHECKING:
    from torch import Tensor

    from mm_adapters.records.spec import Site


def raw_location(root: str, site: Site) -> str:
    """nnsight's own location of the value that a site is part of.

    Raises: AttentionUnreachableError or MissingSiteError if a site is not a module's input or output.
    """
    where = "This service does not have mm-interp and runs blocks in a sandbox, where only a module's input "
    where += "or output can be reached. Serve the model yourself: mm-interp ndif up."
    location = site.location
    is_expanded = isinstance(location, Output) and location.reference_site is not None
    if isinstance(location, Output | Input) and not is_expanded:
        side = "output" if isinstance(location, Output) else "input"
        return f"{root}.{site.module}.{side}" if site.module else f"{root}.{side}"
    if site.part.endswith(("hook_pattern", "hook_attn_scores")):
        raise AttentionUnreachableError(f"{site.name} is inside a fused call. {where}")
    raise MissingSiteError(f"{site.name} is computed from several values. {where}")


def shown(site: Site, raw: Any, n_heads: int | None) -> Tensor:
    """The part of a raw value that a site shows; what is written into it is in the raw value too."""
    location = site.location
    assert isinstance(location, Output | Input)
    if isinstance(location, Input):
        args, kwargs = raw
        if cache_of(kwargs) is not None:
            # It would be sent back as a copy, and the model would go on with the one it has.
            raise MissingSiteError(
                f"{site.name} is read beside a key-value cache, which this service's sandbox cannot "
                "hand over. Read what the block before gives, or serve the model yourself: mm-interp ndif up."
            )
        slot = location.argument if location.argument in kwargs else first_tensor(args, kwargs)
        x = args[slot] if isinstance(slot, int) else kwargs[slot]
    else:
        if location.gain is not None:
            raise MissingSiteError(
                f"{site.name} is a branch times a parameter, which this service's sandbox cannot hand over."
            )
        at = key_of_tensor(raw, location.item)
        x = raw if at is None else raw[at]
    x.data = x.data.contiguous()
    if location.chunk is not None:
        x = x.chunk(location.chunk[0], dim=-1)[location.chunk[1]]
    return x if n_heads is None else x.unflatten(-1, (n_heads, -1))
