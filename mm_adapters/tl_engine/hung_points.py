"""HookPoints that hang under a site's own: an SAE's latents, `SITE.hook_sae_acts_post`.

They stand in `hook_dict` as the sites do, so that TransformerLens' verbs reach them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mm_adapters.tl_engine.hook_point import SitePoint

Move = Callable[[Tensor], Tensor]


def hung_points(root: Any) -> dict[str, HookPoint]:
    """Those of a model, by full name."""
    return {
        f"{site}.{leaf}": point
        for site, at in root.points.by_name.items()
        if at._modules
        for leaf, point in at._modules.items()
    }


def hang(root: Any, site: str, points: Mapping[str, HookPoint]) -> None:
    """Hangs points under a site's, instead of those that hang there."""
    at: SitePoint = root.points.by_name[site]
    at._modules.clear()
    for leaf, point in points.items():
        at.add_module(leaf, point)
    root.renamed()


@contextmanager
def hung_values(
    root: Any, keep: Callable[[str], Any], move: Move | None = None
) -> Iterator[dict[str, Tensor]]:
    """What passes through them inside, by name, once it is over: one value a call of a sampling loop's tower,
    [call, row, ...]; elsewhere the calls' rows, joined."""
    values: dict[str, list[Tensor]] = {}
    joined: dict[str, Tensor] = {}

    def note(name: str, module: Any, args: Any, value: Tensor) -> None:
        value = value.detach()
        values.setdefault(name, []).append(value if move is None else move(value))

    with ExitStack() as stack:
        for name, point in hung_points(root).items():
            if keep(name):
                stack.callback(point.register_forward_hook(partial(note, name)).remove)
        yield joined
    for name, each in values.items():
        join = torch.stack if name.partition(".")[0] in root.sitemap.loops else torch.cat
        joined[name] = join(each)
