"""Pictures drawn with edits of single rows; where attention was blocked, it is checked that none is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from methods_multimodal.cross_attention import _knockout
from methods_multimodal.cross_attention._rows import RowEdit, generate
from mm_adapters import Model, Read


def generate_checked(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    row_edits: Sequence[RowEdit],
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """Pictures from one noise; where attention was blocked it is checked that none is left."""
    left_by_site = _knockout.watch(row_edits)
    reads = [Read(site, reduce=left, rows="cond") for site, left in left_by_site.items()]
    images = generate(model, prompts, [seed] * len(prompts), row_edits, read=reads, options=options)
    _knockout.verify(left_by_site)
    return images
