"""SAEs in a model's forward, as edits for any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from integrations.sae_lens._sites import SAESite, find_site, heads_side_by_side
from mm_adapters import Edit, InputError, Model

Change = Callable[[Tensor], Tensor]


def check_fit(model: Model, sae: SAE[Any], tower: str = "") -> SAESite:
    """Where an SAE lives in this model; of a tower, its names may be the tower's own.

    Raises: MissingSiteError if there is no such site; InputError if the SAE does not name one.
    """
    name = sae.cfg.metadata.hook_name
    if not name:
        raise InputError("This SAE's metadata has no hook_name. Set sae.cfg.metadata.hook_name to a site.")
    minus = sae.cfg.metadata.hook_name_minus
    sites = [in_tower(site, tower) for site in ([name, minus] if minus else [name])]
    return find_site(model, " - ".join(sites))


def written_site(model: Model, sae: SAE[Any], tower: str = "") -> SAESite:
    """The site an SAE writes: of a transcoder another than the one it reads. Raises: as `check_fit`."""
    out = sae.cfg.metadata.hook_name_out
    written = find_site(model, in_tower(out, tower)) if out else check_fit(model, sae, tower)
    if written.norm is not None:
        raise InputError(
            f"{written.name} can be read and not written. Train on ln2.hook_normalized, or a transcoder."
        )
    return written


def in_tower(name: str, tower: str = "") -> str:
    """A tower's own name of a site as the model's; the tower's prefix may be there already."""
    return f"{tower}.{name.removeprefix(f'{tower}.')}" if tower else name


def splice(
    model: Model,
    sae: SAE[Any],
    *,
    change: Change | None = None,
    use_error_term: bool = False,
    mask: Tensor | None = None,
    steps: Any = None,
    rows: Any = "all",
) -> list[Edit]:
    """Edits that replace a site by the SAE's reconstruction of it, for `model.run(edit=...)`.

    The SAE of an update ("OUT - IN") and a transcoder take two edits, of which the first only reads.

    Args:
        change: Gets the latents, [..., pos, latent], and returns them changed.
        use_error_term: Keeps what the SAE does not explain, so that without a change the site's value
            stays as it is.
        mask: [row, pos], true at the positions that are replaced; None: all.
        steps, rows: Of a sampling loop, as in `Edit`.
    """
    sae_site = check_fit(model, sae)
    out = written_site(model, sae)
    source: dict[str, Tensor] = {}

    def read(value: Tensor) -> Tensor:
        source["value"] = value
        return value

    def put(value: Tensor) -> Tensor:
        flat = out.flatten(value)
        before = flat.new_zeros(())
        if sae_site.minus is not None:
            before = sae_site.flatten(source["value"])
            encoded = flat - before
        elif out.site.name != sae_site.site.name:
            encoded = sae_site.flatten(source["value"])
        else:
            encoded = flat
        check_width(sae, encoded, sae_site)
        new = reconstructed(sae, encoded, flat - before, change, use_error_term) + before
        if mask is not None:
            new = torch.where(mask.to(new.device)[..., None], new, flat)
        return out.unflatten(new.to(value.dtype), value)

    edits = [Edit(out.site.name, put, steps=steps, rows=rows)]
    first = sae_site.minus or (sae_site.site if out.site.name != sae_site.site.name else None)
    return edits if first is None else [Edit(first.name, read, steps=steps, rows=rows), *edits]


def reconstructed(
    sae: SAE[Any], encoded: Tensor, target: Tensor, change: Change | None, use_error_term: bool
) -> Tensor:
    """The SAE's output for `encoded`, with its latents changed; with the error term, plus what its
    unchanged output lacks of `target`."""
    with heads_side_by_side(sae):
        acts = sae.encode(encoded)
        clean = sae.decode(acts)
        new = clean if change is None else sae.decode(change(acts))
    # Without a change the target itself: target - clean + clean would be off by rounding.
    return target + (new - clean) if use_error_term else new


def check_width(sae: SAE[Any], encoded: Tensor, sae_site: SAESite) -> None:
    if encoded.shape[-1] != sae.cfg.d_in:
        raise InputError(
            f"{sae_site.name} has {encoded.shape[-1]} numbers a position and this SAE takes {sae.cfg.d_in}. "
            "It was trained on another site or another model."
        )
