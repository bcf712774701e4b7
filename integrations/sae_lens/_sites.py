"""The sites an SAE reads and writes, and how a site's value becomes rows of activations and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from mm_adapters import InputError, Model, Read, Run, Site, TokenLayout

Tokens = str | Sequence[str]
# Positions that have no layout of their own: a denoiser's latents, a projector's patches.
_PLAIN = ("all", "latent", "patch", "image")


@dataclass(frozen=True)
class SAESite:
    """One column of activations: a site, or the update that a block makes ("OUT - IN": two sites).

    Of `mlp.hook_in` the site is what its norm normalizes, and `norm` does the rest.
    """

    name: str
    site: Site
    minus: Site | None = None
    norm: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)

    @property
    def sites(self) -> list[Site]:
        return [self.site] if self.minus is None else [self.site, self.minus]

    @property
    def is_map(self) -> bool:
        return self.site.axes[1:2] == ("channel",)

    def flatten(self, value: Tensor) -> Float[Tensor, "*batch pos d"]:
        """A value of the site as [..., pos, d]: maps channel-last, heads side by side."""
        if self.norm is not None:
            return self.norm(value)
        if self.is_map:
            return rearrange(value, "... c h w -> ... (h w) c")
        if self.site.axes[2].startswith("head"):
            return rearrange(value, "... h d -> ... (h d)")
        return value

    def unflatten(self, flat: Tensor, value: Tensor) -> Tensor:
        """Rows [..., pos, d] in the shape of the site's own `value`."""
        if self.is_map:
            return rearrange(flat, "... (h w) c -> ... c h w", h=value.shape[-2])
        return flat.reshape(value.shape)


@contextmanager
def heads_side_by_side(sae: SAE[Any]) -> Iterator[None]:
    """Inside, an SAE of `hook_z` takes and gives rows with the heads side by side, [..., pos, d]."""
    names = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")
    before = {name: getattr(sae, name) for name in names if hasattr(sae, name)}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(sae, name, value)


def find_site(model: Model, name: str) -> SAESite:
    """The SAE site of this name: "SITE", or "OUT - IN".

    Raises: MissingSiteError if there is no such site; InputError if its rows are not positions.
    """
    first, _, second = (part.strip() for part in name.partition(" - "))
    if first.endswith(".mlp.hook_in") and not second:
        return _mlp_input(model, name)
    sites = [model.check_site(n) for n in ([first, second] if second else [first])]
    for site in sites:
        if site.axes[1:2] not in (("pos",), ("channel",)):
            raise InputError(
                f"{site.name} is [{', '.join(site.axes)}]: an SAE reads one vector a position. Choose a "
                "residual stream, a block's output, an MLP's neurons, hook_z, or a map."
            )
    if len(sites) == 2 and sites[0].tower != sites[1].tower:
        raise InputError(f"{name}: an update is within one tower.")
    return SAESite(name, sites[0], sites[1] if second else None)


def _mlp_input(model: Model, name: str) -> SAESite:
    """SAELens' `mlp.hook_in`, what an MLP is given: its norm's output, with gain and bias.

    Raises: MissingSiteError where the norm does not stand right before the MLP.
    """
    block = name.removesuffix(".mlp.hook_in")
    order = [site for site in model.sites(f"{block}.*") if site.location is not None]
    names = [site.name for site in order]
    normalized = f"{block}.ln2.hook_normalized"
    after = names[names.index(normalized) + 1] if normalized in names[:-1] else ""
    if name in names or not (after == f"{block}.hook_mlp_out" or after.startswith(f"{block}.mlp.")):
        return SAESite(name, model.check_site(name))
    site = model.check_site(normalized)
    tower = model.check_tower(site.tower)
    assert site.layer is not None
    assert site.stack is not None
    weights = tower.weights(site.layer, site.stack).names("ln2")

    def norm(value: Tensor) -> Tensor:
        gain, bias = (weights[part]().to(value) for part in ("w", "b"))
        return value * gain + bias

    return SAESite(name, site, norm=norm)


def reads_of(
    model: Model, sae_sites: Iterable[SAESite], steps: Iterable[int] | None, rows: str = "cond"
) -> list[Read]:
    """What to read in one run for these SAE sites: of a sampling loop, the conditional rows."""
    reads: dict[str, Read] = {}
    for sae_site in sae_sites:
        for site in sae_site.sites:
            is_looped = site.tower in model.loops()
            reads[site.name] = Read(
                site.name,
                steps=None if steps is None or not is_looped else list(steps),
                rows=rows if is_looped else "all",  # type: ignore[arg-type]
            )
    return list(reads.values())


def value_at(run: Run, sae_site: SAESite) -> Float[Tensor, "*batch pos d"]:
    """The SAE site's value in a run, [..., pos, d]."""
    value = sae_site.flatten(run[sae_site.site.name])
    return value if sae_site.minus is None else value - sae_site.flatten(run[sae_site.minus.name])


def layouts_of(
    model: Model, inputs: Mapping[str, Any], sae_sites: Sequence[SAESite]
) -> Mapping[str, TokenLayout]:
    """What each position of these sites' towers is.

    Of a pipeline, nothing, except of a denoiser where text and image attend together.
    """
    loop = model.record.loop
    if loop is not None:
        if model.towers[loop].record.joint is None or inputs.get("prompt") is None:
            return {}
        return model.layout(**{"text": inputs["prompt"]} | {k: v for k, v in inputs.items() if k != "prompt"})
    towers = [model.check_tower(sae_site.site.tower) for sae_site in sae_sites]
    if any(tower.role != "vision" for tower in towers):
        return model.layout(**inputs)
    # To lay texts out takes a tokenizer, which a vision tower's positions do not need.
    raw = {
        name: inputs[name]
        for name in ("text", "images")
        # open_clip's argument of tokens is called text too.
        if inputs.get(name) is not None and not (name == "text" and isinstance(inputs[name], Tensor))
    }
    ready = {name: value for name, value in inputs.items() if name not in raw}
    ready |= model.prepare(**raw) if raw else {}
    texts = {tower.input_name for tower in model.towers.values() if tower.role in ("text", "language")}
    return model.layout(**{name: value for name, value in ready.items() if name not in texts})


def mask_of(
    layout: TokenLayout | None, tokens: Tokens, sae_site: SAESite, n_rows: int, n_pos: int
) -> Bool[Tensor, "row pos"]:
    """The positions with these roles. Raises: InputError if there is no such role, with those there are."""
    roles = [tokens] if isinstance(tokens, str) else list(tokens)
    if layout is None:
        if set(roles) - set(_PLAIN):
            raise InputError(
                f"{sae_site.name} has no {roles}: its positions are all alike. Pass tokens='all'."
            )
        return torch.ones(n_rows, n_pos, dtype=torch.bool)
    layout = stream_of(layout, sae_site, n_pos)
    if n_pos == 1 < layout.n_pos and n_rows == layout.n_rows:  # Past the pooling, as CLIP's vision.ln_final.
        if "all" in roles:
            return torch.ones(n_rows, 1, dtype=torch.bool)
        raise InputError(
            f"{sae_site.name} has one position a row, pooled from {layout.n_pos}: it is no {roles[0]!r} of "
            "them. Pass tokens='all'."
        )
    if (layout.n_rows, layout.n_pos) != (n_rows, n_pos):
        raise InputError(
            f"{sae_site.name} has {n_rows} rows of {n_pos} positions and its layout says {layout.n_rows} of "
            f"{layout.n_pos}. Choose a site whose positions are its tower's tokens."
        )
    if "all" in roles:
        return torch.ones(n_rows, n_pos, dtype=torch.bool)
    known = sorted({role for row in layout.roles for role in row})
    missing = [role for role in roles if role not in known]
    if missing:
        raise InputError(
            f"{sae_site.name} has no position that is {missing[0]!r}; it has {', '.join(known)}, all."
        )
    mask = torch.zeros(n_rows, n_pos, dtype=torch.bool)
    for role in roles:
        mask |= layout.mask(role)
    return mask


def stream_of(layout: TokenLayout, sae_site: SAESite, n_pos: int) -> TokenLayout:
    """The layout of the site's own positions.

    Where a joint attention keeps text and image in streams of their own, those of the site's stream; a
    site of the text stream is named `text_...`.
    """
    if layout.n_pos == n_pos or "latent" not in layout.roles[0]:
        return layout
    of_text = any(word.removeprefix("hook_").startswith("text_") for word in sae_site.site.part.split("."))
    kept = [p for p, role in enumerate(layout.roles[0]) if (role == "latent") != of_text]

    def kept_of(rows: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row[p] for p in kept) for row in rows)

    return TokenLayout(kept_of(layout.roles), None if of_text else layout.grid, kept_of(layout.patches))


def rows_of(
    model: Model, run: Run, sae_sites: Sequence[SAESite], tokens: Tokens, layout: Mapping[str, TokenLayout]
) -> dict[str, Tensor]:
    """The chosen rows of each SAE site in a run, [n, d], in the order step, row of the batch, position;
    and under "where" what they are: [n, 3] with row, position and step (-1 outside a loop).

    Raises: InputError if two sites have other rows.
    """
    chosen: dict[str, Tensor] = {}
    where: Tensor | None = None
    for sae_site in sae_sites:
        value = value_at(run, sae_site)
        is_looped = sae_site.site.tower in model.loops()
        value = value if is_looped else value[None]
        n_steps, n_rows, n_pos, _ = value.shape
        mask = mask_of(layout.get(sae_site.site.tower), tokens, sae_site, n_rows, n_pos)
        row, pos = mask.nonzero(as_tuple=True)
        step = torch.arange(n_steps) if is_looped else torch.tensor([-1])
        origins = torch.stack(
            [row.repeat(n_steps), pos.repeat(n_steps), step.repeat_interleave(len(row))], 1
        ).int()
        if where is None:
            where = origins
        elif not torch.equal(where, origins):
            raise InputError(
                f"{sae_sites[0].name} has {len(where)} rows and {sae_site.name} has {len(origins)}: they are "
                "not the same positions. Collect them into folders of their own."
            )
        chosen[sae_site.name] = value[:, mask.to(value.device)].flatten(0, 1)
    assert where is not None
    return chosen | {"where": where}


def editor(sae_site: SAESite, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """An edit of the site made of an edit of its rows, [..., pos, d]."""
    return lambda value: sae_site.unflatten(change(sae_site.flatten(value)), value)
