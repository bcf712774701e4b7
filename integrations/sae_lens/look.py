"""What a latent sees, as a picture; and what the model does when it is turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from sae_lens import SAE
from torch import Tensor

from integrations.sae_lens._data import inputs_of, items_of
from integrations.sae_lens._sites import layouts_of, reads_of, value_at
from integrations.sae_lens.splice import check_fit, splice
from mm_adapters import Edit, HookedModel, InputError, Lens

How = Literal["add", "ablate", "clamp"]


@dataclass(frozen=True)
class TopImages:
    """Of one latent: the items it is most active in, strongest first, with its activation at each patch;
    its positive activations over all positions seen, and the words nearest to those items."""

    latent: int
    items: tuple[int, ...]
    maps: Float[Tensor, "item row col"]
    histogram: Float[Tensor, " n"]
    share_active: float
    words: tuple[str, ...] = ()


@torch.no_grad()
def top_images(
    sae: SAE[Any],
    lens: Lens,
    data: Any,
    latents: Sequence[int],
    *,
    n: int = 9,
    words: Sequence[str] = (),
    clip: HookedModel | None = None,
    inputs: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[TopImages]:
    """For each latent the `n` items of its highest activation at a patch.

    `words` are ranked by how much nearer they are, by CLIP, to these items than to all; `clip` may be
    another model than `lens`. Memory does not grow with the items.

    Raises: InputError if the site has no grid of patches, or words are given and no CLIP.
    """
    sae_site = check_fit(lens, sae)
    items = items_of(data)
    chosen = torch.tensor(list(latents))
    best = torch.full((len(chosen), n), -torch.inf)
    which = torch.full((len(chosen), n), -1, dtype=torch.int64)
    maps: Tensor | None = None
    generator = torch.Generator().manual_seed(seed)
    samples: list[Tensor] = []
    active, seen = torch.zeros(len(chosen)), 0
    for at in range(0, len(items), batch_size):
        numbers = list(range(at, min(at + batch_size, len(items))))
        given = inputs_of(lens, [items[i] for i in numbers], numbers, inputs or {})
        run = lens.run(given, read=reads_of(lens, [sae_site], None))
        layout = layouts_of(lens, given, [sae_site]).get(sae_site.site.tower)
        if layout is None or layout.grid is None:
            raise InputError(f"{sae_site.name} has no grid of patches to draw.")
        here = [p for p in range(layout.n_pos) if layout.patches[0][p] is not None]
        acts = sae.encode(value_at(run, sae_site)[:, here].float())[..., chosen]
        grids = acts.permute(2, 0, 1).unflatten(-1, layout.grid)
        active += (acts > 0).sum((0, 1))
        seen += acts.shape[0] * acts.shape[1]
        flat = acts.flatten(0, 1)
        samples.append(flat[torch.randint(len(flat), (256,), generator=generator)])
        maps = grids.new_zeros(len(chosen), n, *layout.grid) if maps is None else maps
        scores = torch.cat([best, grids.amax((-1, -2))], 1)
        best, order = scores.topk(n, dim=1)
        ids = torch.tensor(numbers).expand(len(chosen), -1)
        which = torch.cat([which, ids], 1).gather(1, order)
        index = order[..., None, None].expand(-1, -1, *layout.grid)
        maps = torch.cat([maps, grids], 1).gather(1, index)
    assert maps is not None
    sampled = torch.cat(samples)
    found = []
    for i, latent in enumerate(latents):
        kept = tuple(j for j in which[i].tolist() if j >= 0)
        found.append(
            TopImages(
                int(latent), kept, maps[i, : len(kept)], sampled[:, i][sampled[:, i] > 0],
                float(active[i] / seen), _nearest(words, clip or lens, [items[j] for j in kept], items),
            )
        )  # fmt: skip
    return found


def gallery(found: TopImages, data: Any) -> Figure:
    """A picture of one latent: its top images with the activation as a heat map, its histogram, its words."""
    from mm_adapters.inputs.images import to_rgb_list

    items = items_of(data)
    pictures = [np.asarray(p) for p in to_rgb_list([items[i] for i in found.items])]
    cols = 3
    rows = -(-len(pictures) // cols)
    figure = plt.figure(figsize=(8.4, 1.75 * rows + 0.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    left, right = parts
    axes: Any = left.subplots(rows, cols, squeeze=False)
    top = float(found.maps.max()) if len(pictures) else 1.0
    drawn = None
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, heat in zip(axes.flat, pictures, found.maps.numpy(), strict=False):
        height, width = picture.shape[:2]
        axis.imshow(picture)
        drawn = axis.imshow(
            heat, extent=(0, width, height, 0), cmap="inferno", vmin=0, vmax=top or 1,
            alpha=0.75 * heat / (top or 1), interpolation="nearest",
        )  # fmt: skip
    if drawn is not None:
        left.colorbar(drawn, ax=list(axes.flat), shrink=0.6, label="activation")
    chart: Any = right.subplots(1, 1)
    chart.hist(found.histogram.numpy(), bins=24, color="0.35")
    chart.set(xlabel="activation, where active", ylabel="positions (sample)", yscale="log")
    words = "".join(f"\n{word}" for word in found.words[:4])
    chart.set_title(f"active at {found.share_active:.2%} of patches{words}", fontsize=9)
    figure.suptitle(f"latent {found.latent}", fontsize=11)
    return figure


def steer(
    lens: Lens, sae: SAE[Any], latent: int, how: How, value: float = 0.0, *, steps: Any = None,
    rows: Any = "all", mask: Tensor | None = None,
) -> list[Edit]:  # fmt: skip
    """Edits that turn one latent, for `lens.run(edit=...)` and `model.generate(edit=...)`.

    "add" adds `value` to its activation, "clamp" sets it to `value`, "ablate" to zero. What the SAE does
    not explain stays (the error term).

    Raises: InputError for an unknown way or a latent the SAE does not have.
    """
    if how not in ("add", "ablate", "clamp"):
        raise InputError(f"how={how!r}: a latent is turned by 'add', 'ablate' or 'clamp'.")
    if not 0 <= latent < sae.cfg.d_sae:
        raise InputError(f"This SAE has latents 0 to {sae.cfg.d_sae - 1}, not {latent}.")

    def change(acts: Tensor) -> Tensor:
        new = acts.clone()
        if how == "add":
            new[..., latent] = acts[..., latent] + value
        else:
            new[..., latent] = 0.0 if how == "ablate" else value
        return new

    return splice(lens, sae, change=change, use_error_term=True, steps=steps, rows=rows, mask=mask)


def _nearest(words: Sequence[str], clip: Any, top: Sequence[Any], every: Sequence[Any]) -> tuple[str, ...]:
    """The words that these items are nearer to than items are on average, the nearest first."""
    if not words or not top:
        return ()
    if not hasattr(clip, "embed"):
        raise InputError("Words are ranked by a CLIP: pass clip=mm.load(...).")
    unit = lambda x: torch.nn.functional.normalize(x.float(), dim=-1)  # noqa: E731
    some = list(every[:: max(1, len(every) // 64)][:64])
    texts = unit(clip.embed(text=list(words)))
    near = unit(clip.embed(images=list(top))).mean(0) - unit(clip.embed(images=some)).mean(0)
    return tuple(words[int(i)] for i in (texts @ near).argsort(descending=True))
