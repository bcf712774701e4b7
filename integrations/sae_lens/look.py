"""A picture of what activates a latent, and edits that steer by it."""

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
from integrations.sae_lens._sites import heads_side_by_side, layouts_of, reads_of, value_at
from integrations.sae_lens.splice import check_fit, splice
from mm_adapters import Edit, InputError, Model
from mm_adapters.inputs.images import to_rgb_list

Mode = Literal["add", "ablate", "clamp"]


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
    model: Model,
    sae: SAE[Any],
    data: Any,
    latents: Sequence[int],
    *,
    n: int = 9,
    words: Sequence[str] = (),
    clip: Model | None = None,
    inputs: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[TopImages]:
    """For each latent the `n` items of its highest activation at a patch.

    Memory does not grow with the items.

    Args:
        data: As `collect` takes it: a folder of images, or a list of images or dicts of inputs.
        latents: Numbers of latents.
        n: How many items a latent.
        words: Ranked by how much nearer they are, by CLIP, to a latent's items than to all items.
        clip: The contrastive model that ranks them; None: `model`.
        inputs: Go to every run.
        batch_size: Items a run.
        seed: Of the sample of positions that the histogram is made of.

    Raises: InputError if the site has no grid of patches, or words are given and no CLIP.
    """
    sae_site = check_fit(model, sae)
    items = items_of(data)
    numbers_of_latents = torch.tensor(list(latents))
    best = torch.full((len(latents), n), -torch.inf)
    which = torch.full((len(latents), n), -1, dtype=torch.int64)
    maps: Tensor | None = None
    generator = torch.Generator().manual_seed(seed)
    samples: list[Tensor] = []
    active, n_positions = torch.zeros(len(latents)), 0
    for at in range(0, len(items), batch_size):
        numbers = list(range(at, min(at + batch_size, len(items))))
        arguments = inputs_of(model, [items[i] for i in numbers], numbers, inputs or {})
        run = model.run(arguments, read=reads_of(model, [sae_site], None))
        layout = layouts_of(model, arguments, [sae_site]).get(sae_site.site.tower)
        if layout is None or layout.grid is None:
            raise InputError(f"{sae_site.name} has no grid of patches to draw.")
        patches = [p for p in range(layout.n_pos) if layout.patches[0][p] is not None]
        with heads_side_by_side(sae):
            acts = sae.encode(value_at(run, sae_site)[:, patches].float())[..., numbers_of_latents]
        grids = acts.permute(2, 0, 1).unflatten(-1, layout.grid)
        active += (acts > 0).sum((0, 1))
        n_positions += acts.shape[0] * acts.shape[1]
        flat = acts.flatten(0, 1)
        samples.append(flat[torch.randint(len(flat), (256,), generator=generator)])
        maps = grids.new_zeros(len(latents), n, *layout.grid) if maps is None else maps
        scores = torch.cat([best, grids.amax((-1, -2))], 1)
        best, order = scores.topk(n, dim=1)
        ids = torch.tensor(numbers).expand(len(latents), -1)
        which = torch.cat([which, ids], 1).gather(1, order)
        index = order[..., None, None].expand(-1, -1, *layout.grid)
        maps = torch.cat([maps, grids], 1).gather(1, index)
    assert maps is not None
    sampled = torch.cat(samples)
    top = []
    for i, latent in enumerate(latents):
        kept = tuple(j for j in which[i].tolist() if j >= 0)
        top.append(
            TopImages(
                latent=int(latent),
                items=kept,
                maps=maps[i, : len(kept)],
                histogram=sampled[:, i][sampled[:, i] > 0],
                share_active=float(active[i] / n_positions),
                words=_nearest(words, clip or model, [items[j] for j in kept], items),
            )
        )
    return top


def gallery(top: TopImages, data: Any) -> Figure:
    """A picture of one latent: its top images with the activation as a heat map, its histogram, its words."""
    items = items_of(data)
    pictures = [np.asarray(p) for p in to_rgb_list([items[i] for i in top.items])]
    cols = 3
    rows = -(-len(pictures) // cols)
    figure = plt.figure(figsize=(8.4, 1.75 * rows + 0.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    left, right = parts
    axes: Any = left.subplots(rows, cols, squeeze=False)
    highest = float(top.maps.max()) if len(pictures) else 1.0
    heat_map = None
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, heat in zip(axes.flat, pictures, top.maps.numpy(), strict=False):
        height, width = picture.shape[:2]
        axis.imshow(picture)
        heat_map = axis.imshow(
            heat,
            extent=(0, width, height, 0),
            cmap="inferno",
            vmin=0,
            vmax=highest or 1,
            alpha=0.75 * heat / (highest or 1),
            interpolation="nearest",
        )
    if heat_map is not None:
        left.colorbar(heat_map, ax=list(axes.flat), shrink=0.6, label="activation")
    chart: Any = right.subplots(1, 1)
    chart.hist(top.histogram.numpy(), bins=24, color="0.35")
    chart.set(xlabel="activation, where active", ylabel="positions (sample)", yscale="log")
    words = "".join(f"\n{word}" for word in top.words[:4])
    chart.set_title(f"active at {top.share_active:.2%} of patches{words}", fontsize=9)
    figure.suptitle(f"latent {top.latent}", fontsize=11)
    return figure


def steer(
    model: Model,
    sae: SAE[Any],
    latent: int,
    mode: Mode,
    value: float = 0.0,
    *,
    steps: Any = None,
    rows: Any = "all",
    mask: Tensor | None = None,
) -> list[Edit]:
    """Edits that steer by one latent, for `model.run(edit=...)` and `model.generate(edit=...)`.

    What the SAE does not explain stays (the error term).

    Args:
        mode: "add" adds `value` to the latent's activation, "clamp" sets it to `value`, "ablate" to zero.
        steps, rows: Of a sampling loop, as in `Edit`.
        mask: [row, pos], true at the positions that are edited; None: all.

    Raises: InputError for an unknown mode or a latent the SAE does not have.
    """
    if mode not in ("add", "ablate", "clamp"):
        raise InputError(f"mode={mode!r}: a latent is steered by 'add', 'ablate' or 'clamp'.")
    if not 0 <= latent < sae.cfg.d_sae:
        raise InputError(f"This SAE has latents 0 to {sae.cfg.d_sae - 1}, not {latent}.")

    def change(acts: Tensor) -> Tensor:
        new = acts.clone()
        if mode == "add":
            new[..., latent] = acts[..., latent] + value
        else:
            new[..., latent] = 0.0 if mode == "ablate" else value
        return new

    return splice(model, sae, change=change, use_error_term=True, steps=steps, rows=rows, mask=mask)


def _nearest(words: Sequence[str], clip: Model, top: Sequence[Any], every: Sequence[Any]) -> tuple[str, ...]:
    """The words that these items are nearer to than items are on average, the nearest first."""
    if not words or not top:
        return ()
    if clip.kind != "contrastive":
        raise InputError(f"Words are ranked by a CLIP, and {clip.name} is not one: pass clip=mm.load(...).")
    some = list(every[:: max(1, len(every) // 64)][:64])
    texts = _embed(clip, "text", words)
    near = _embed(clip, "vision", top).mean(0) - _embed(clip, "vision", some).mean(0)
    return tuple(words[int(i)] for i in (texts @ near).argsort(descending=True))


def _embed(clip: Model, tower: str, items: Sequence[Any]) -> Float[Tensor, "item width"]:
    """Unit vectors of texts or images in a contrastive model's joint space."""
    ready = clip.prepare(**{"text" if tower == "text" else "images": list(items)})
    vectors = clip.check_tower(tower).summary(clip.run(ready).output)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)
