"""Where an SAE lives, and how a site's value becomes rows of activations and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mm_adapters import InputError, Read, Run, Site, TokenLayout
from mm_adapters.layouts.of_model import layouts
from mm_adapters.layouts.of_prompt import prompt_layouts

Tokens = str | Sequence[str]
# Positions that have no layout of their own: a denoiser's latents, a projector's patches.
_PLAIN = ("all", "latent", "patch", "image")


@dataclass(frozen=True)
class SAESite:
    """One column of activations: a site, or the update that a block makes ("OUT - IN": two sites)."""

    name: str
    site: Site
    minus: Site | None = None

    @property
    def sites(self) -> list[Site]:
        return [self.site] if self.minus is None else [self.site, self.minus]

    @property
    def is_map(self) -> bool:
        return self.site.axes[1:2] == ("channel",)

    def flat(self, value: Tensor) -> Float[Tensor, "*batch pos d"]:
        """A value of the site as [..., pos, d]: maps channel-last, heads side by side."""
        if self.is_map:
            return rearrange(value, "... c h w -> ... (h w) c")
        if self.site.axes[2].startswith("head"):
            return rearrange(value, "... h d -> ... (h d)")
        return value

    def like(self, flat: Tensor, value: Tensor) -> Tensor:
        """What `flat` made of `value` looks like, as the site has it."""
        if self.is_map:
            return rearrange(flat, "... (h w) c -> ... c h w", h=value.shape[-2])
        return flat.reshape(value.shape)


def place_of(lens: Any, name: str) -> SAESite:
    """The place with this name. Raises: MissingSiteError; InputError if its rows are no positions."""
    first, _, second = (part.strip() for part in name.partition(" - "))
    sites = [lens.sitemap[n] for n in ([first, second] if second else [first])]
    for site in sites:
        if site.axes[1:2] not in (("pos",), ("channel",)):
            raise InputError(
                f"{site.name} is [{', '.join(site.axes)}]: an SAE reads one vector a position. Choose a "
                "residual stream, a block's output, an MLP's neurons, hook_z, or a map."
            )
    if len(sites) == 2 and sites[0].tower != sites[1].tower:
        raise InputError(f"{name}: an update is within one tower.")
    return SAESite(name, sites[0], sites[1] if second else None)


def reads_of(
    lens: Any, sae_sites: Iterable[SAESite], steps: Iterable[int] | None, rows: str = "cond"
) -> list[Read]:
    """What to read in one run for these places: of a sampling loop, the conditional rows."""
    found: dict[str, Read] = {}
    for sae_site in sae_sites:
        for site in sae_site.sites:
            inside = site.tower in lens.sitemap.loops
            found[site.name] = Read(
                site.name,
                steps=None if steps is None or not inside else list(steps),
                rows=rows if inside else "all",  # type: ignore[arg-type]
            )
    return list(found.values())


def value_at(run: Run, sae_site: SAESite) -> Float[Tensor, "*batch pos d"]:
    """The place's value in a run, [..., pos, d]."""
    value = sae_site.flat(run[sae_site.site.name])
    return value if sae_site.minus is None else value - sae_site.flat(run[sae_site.minus.name])


def layouts_of(lens: Any, inputs: Mapping[str, Any], sae_sites: Sequence[SAESite]) -> dict[str, TokenLayout]:
    """What each position of these places' towers is, through either engine.

    Of a pipeline, nothing, but of a denoiser where text and image attend as one.
    """
    loop = lens.sitemap.model_record.loop
    if loop is not None:
        if lens.sitemap.towers[loop].record.joint is None or inputs.get("prompt") is None:
            return {}
        prompts = [inputs["prompt"]] if isinstance(inputs["prompt"], str) else inputs["prompt"]
        return prompt_layouts(lens.wrapped, lens.sitemap, lens.tokenizer_of, prompts, inputs)
    raw = {k: inputs[k] for k in ("text", "images") if inputs.get(k) is not None}
    prepared = {k: v for k, v in inputs.items() if k not in raw}
    texts = None
    source = lens.inputs if "inputs" in getattr(lens, "__dict__", {}) else getattr(lens, "_inputs", None)
    if raw:
        if source is not None and "text" in raw and not isinstance(raw["text"], Tensor):
            texts = source.prompts(raw["text"], raw.get("images"))
        prepared |= lens.prepare(**raw)
    towers = {sae_site.site.tower: lens.sitemap.towers[sae_site.site.tower] for sae_site in sae_sites}
    if all(tower.record.role == "vision" for tower in towers.values()):
        # Texts need a tokenizer to be laid out, which nobody needs here.
        takes = {tower.mount.takes or tower.record.takes for tower in towers.values()}
        prepared, texts = {k: v for k, v in prepared.items() if k in takes}, None
    return layouts(lens.wrapped, lens.sitemap, lens.tokenizer_of, prepared, texts)


def mask_of(
    layout: TokenLayout | None, tokens: Tokens, sae_site: SAESite, n_rows: int, n_pos: int
) -> Bool[Tensor, "row pos"]:
    """The positions with these roles. Raises: InputError if there is no such role, with those there are."""
    wanted = [tokens] if isinstance(tokens, str) else list(tokens)
    if layout is None:
        if set(wanted) - set(_PLAIN):
            raise InputError(
                f"{sae_site.name} has no {wanted}: its positions are all alike. Pass tokens='all'."
            )
        return torch.ones(n_rows, n_pos, dtype=torch.bool)
    layout = stream_of(layout, sae_site, n_pos)
    if n_pos == 1 < layout.n_pos and n_rows == layout.n_rows:  # Past the pooling, as CLIP's vision.ln_final.
        if "all" in wanted:
            return torch.ones(n_rows, 1, dtype=torch.bool)
        raise InputError(
            f"{sae_site.name} has one position a row, pooled from {layout.n_pos}: it is no {wanted[0]!r} of "
            "them. Pass tokens='all'."
        )
    if (layout.n_rows, layout.n_pos) != (n_rows, n_pos):
        raise InputError(
            f"{sae_site.name} has {n_rows} rows of {n_pos} positions and its layout says {layout.n_rows} of "
            f"{layout.n_pos}. Choose a site whose positions are its tower's tokens."
        )
    if "all" in wanted:
        return torch.ones(n_rows, n_pos, dtype=torch.bool)
    there = sorted({role for row in layout.roles for role in row})
    missing = [role for role in wanted if role not in there]
    if missing:
        raise InputError(
            f"{sae_site.name} has no position that is {missing[0]!r}; it has {', '.join(there)}, all."
        )
    mask = torch.zeros(n_rows, n_pos, dtype=torch.bool)
    for role in wanted:
        mask |= layout.mask(role)
    return mask


def stream_of(layout: TokenLayout, sae_site: SAESite, n_pos: int) -> TokenLayout:
    """The layout of the place's own positions: of a joint attention's, those of its stream, where the
    streams are apart (its sites of the text are named so)."""
    if layout.n_pos == n_pos or "latent" not in layout.roles[0]:
        return layout
    of_text = any(word.removeprefix("hook_").startswith("text_") for word in sae_site.site.part.split("."))
    kept = [p for p, role in enumerate(layout.roles[0]) if (role == "latent") != of_text]

    def own(rows: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row[p] for p in kept) for row in rows)

    return TokenLayout(own(layout.roles), None if of_text else layout.grid, own(layout.patches))


def rows_of(
    lens: Any, run: Run, sae_sites: Sequence[SAESite], tokens: Tokens, layout: Mapping[str, TokenLayout]
) -> dict[str, Tensor]:
    """The chosen rows of each place in a run, [n, d], in the order step, row of the batch, position;
    and under "where" what they are: [n, 3] with row, position and step (-1 outside a loop).

    Raises: InputError if two places have other rows.
    """
    found: dict[str, Tensor] = {}
    where: Tensor | None = None
    for sae_site in sae_sites:
        value = value_at(run, sae_site)
        looped = sae_site.site.tower in lens.sitemap.loops
        value = value if looped else value[None]
        n_steps, n_rows, n_pos, _ = value.shape
        mask = mask_of(layout.get(sae_site.site.tower), tokens, sae_site, n_rows, n_pos)
        row, pos = mask.nonzero(as_tuple=True)
        step = torch.arange(n_steps) if looped else torch.tensor([-1])
        here = torch.stack(
            [row.repeat(n_steps), pos.repeat(n_steps), step.repeat_interleave(len(row))], 1
        ).int()
        if where is None:
            where = here
        elif not torch.equal(where, here):
            raise InputError(
                f"{sae_sites[0].name} has {len(where)} rows and {sae_site.name} has {len(here)}: they are "
                "not the same positions. Collect them into folders of their own."
            )
        found[sae_site.name] = value[:, mask.to(value.device)].flatten(0, 1)
    assert where is not None
    return found | {"where": where}


def editor(sae_site: SAESite, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An edit of the site made of an edit of its rows, [..., pos, d]."""
    return lambda value: sae_site.like(change(sae_site.flat(value)), value)
