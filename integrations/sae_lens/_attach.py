"""SAEs that stay on a model until they are taken off: what SAELens' `add_sae` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from torch import Tensor

from integrations.sae_lens._sites import SAESite, Tokens, layouts_of, mask_of
from integrations.sae_lens._special_tokens import SpecialTokens
from integrations.sae_lens.splice import check_fit, check_width, written_site
from mm_adapters import HookedModel, InputError, MissingSiteError


@dataclass
class Attached:
    """An SAE on a site; it writes `out`. `use_error_term` and `special` are as they were given."""

    sae: SAE[Any]
    out: str
    wrapper: _SAEWrapper
    use_error_term: bool | None
    special: bool | list[int]
    tokens: Tokens
    stack: ExitStack = field(default_factory=ExitStack)


def attached_to(root: HookedModel) -> dict[str, Attached]:
    """What is on a model, by the full name of the site it reads."""
    return root.__dict__.setdefault("_saes_attached", {})


def attach(
    root: HookedModel,
    sae: SAE[Any],
    use_error_term: bool | None,
    special: bool | list[int],
    tokens: Tokens,
    tower: str = "",
) -> None:
    """Puts an SAE on its site, instead of one that is there; see `SAEVerbs.add_sae`."""
    sae_site, out = check_fit(root, sae, tower), written_site(root, sae, tower)
    if sae_site.minus is not None:
        raise InputError(f"{sae_site.name} is an update's SAE: use splice(...) and model.run(edit=...).")
    by_head = sae.hook_z_reshaping_mode
    if by_head and (sae_site.site.n_heads is None or out != sae_site):
        raise InputError(
            f"{sae_site.name} -> {out.name}: reshape_activations='hook_z' is for an SAE that reads and "
            "writes one site with heads. Load this SAE with reshape_activations='none'."
        )
    excluded = None if special is False else SpecialTokens(root, sae_site, special)
    name = sae_site.name
    detach(root, [name])
    use = sae.use_error_term if use_error_term is None else use_error_term
    wrapper = _SAEWrapper(sae, use_error_term=use, exclude_special_tokens=special)
    new = Attached(sae, out.site.name, wrapper, use_error_term, special, tokens)

    def put(point: Any, args: Any, value: Tensor) -> Tensor:
        flat = out.flatten(value)
        encoded = flat if wrapper._captured_input is None else wrapper._captured_input
        check_width(sae, encoded, sae_site)
        left = _left(_by_role(root, out, tokens, flat), excluded, flat)
        wrapper.set_token_mask(left)
        try:
            new_value = wrapper(value if by_head else flat).to(value.dtype)
            return new_value if by_head else out.unflatten(new_value, value)
        finally:
            wrapper.set_token_mask(None)

    def capture(point: Any, args: Any, value: Tensor) -> None:
        wrapper.capture_input(sae_site.flatten(value))

    if excluded is not None:
        new.stack.enter_context(excluded.watched())
    if out != sae_site:
        _on(root, new.stack, sae_site.site.name, capture)
    _on(root, new.stack, out.site.name, put)
    attached_to(root)[name] = new
    _hang(root, out.site.name)


def detach(root: HookedModel, names: Iterable[str]) -> None:
    """Takes the SAEs off these sites, where there are any."""
    for name in names:
        old = attached_to(root).pop(name, None)
        if old is not None:
            old.stack.close()
            _hang(root, old.out)


def check_attached(root: HookedModel, names: Iterable[str]) -> None:
    """Raises: MissingSiteError for a site that has no SAE, with those that have."""
    there = attached_to(root)
    for name in names:
        if name not in there:
            root.check_site(name)
            known = ", ".join(there) or "none is attached"
            raise MissingSiteError(f"No SAE is attached to {name!r}. Attached: {known}.")


def _hang(root: HookedModel, site: str) -> None:
    """Hangs the points of the SAEs that write a site under it."""
    points: dict[str, Any] = {}
    for one in attached_to(root).values():
        if one.out == site:
            points |= dict(one.wrapper.named_children())
    if site in root.points.by_name:  # Else the model has lost it.
        root.hang_points(site, points)


def _on(root: HookedModel, stack: ExitStack, site: str, hook: Callable[..., Any]) -> None:
    point = root.points.by_name[site]
    handle = point.register_forward_hook(hook)
    stack.callback(point.refresh)
    stack.callback(handle.remove)


def _left(roles: Tensor | None, excluded: SpecialTokens | None, flat: Tensor) -> Tensor | None:
    """True where the SAE is not applied; None if it is applied everywhere."""
    special = None if excluded is None else excluded.mask(flat)
    return roles if special is None else special if roles is None else roles | special


def _by_role(root: HookedModel, sae_site: SAESite, tokens: Tokens, flat: Tensor) -> Tensor | None:
    """True at the positions of other roles; None if there are none."""
    if tokens == "all":
        return None
    inputs = root.__dict__.get("_saes_inputs")
    if inputs is None:
        raise InputError("tokens= needs to know the inputs: use run_with_saes, or splice(..., mask=...).")
    layout = layouts_of(root, inputs, [sae_site]).get(sae_site.site.tower)
    n_rows, n_pos = flat.shape[:2]
    if layout is not None and set([tokens] if isinstance(tokens, str) else tokens) == {"latent"}:
        n_rows = layout.n_rows  # Latents have the same positions in every row, whatever its text.
    mask = mask_of(layout, tokens, sae_site, n_rows, n_pos)
    return ~mask.repeat(len(flat) // n_rows, 1).to(flat.device)
