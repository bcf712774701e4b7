"""SAEs in a model's forward: as edits for any model, and under SAELens' verbs on a HookedModel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from torch import Tensor

from integrations.sae_lens._sites import SAESite, Tokens, find_site, layouts_of, mask_of
from mm_adapters import Edit, HookedModel, InputError, Model

Change = Callable[[Tensor], Tensor]


def check_fit(model: Model, sae: SAE[Any]) -> SAESite:
    """Where an SAE lives in this model.

    Raises: MissingSiteError if there is no such site; InputError if the SAE does not name one.
    """
    name = sae.cfg.metadata.hook_name
    if not name:
        raise InputError("This SAE's metadata has no hook_name. Set sae.cfg.metadata.hook_name to a site.")
    minus = sae.cfg.metadata.hook_name_minus
    return find_site(model, f"{name} - {minus}" if minus else name)


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
    out = find_site(model, sae.cfg.metadata.hook_name_out or sae_site.site.name)
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
        _check_width(sae, encoded, sae_site)
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
    if sae.cfg.reshape_activations == "hook_z":
        raise InputError("Heads are laid side by side here: load this SAE with reshape_activations='none'.")
    acts = sae.encode(encoded)
    clean = sae.decode(acts)
    new = clean if change is None else sae.decode(change(acts))
    # Without a change the target itself: target - clean + clean would be off by rounding.
    return target + (new - clean) if use_error_term else new


@dataclass
class _Attached:
    sae: SAE[Any]
    wrapper: _SAEWrapper
    use_error_term: bool | None
    tokens: Tokens
    stack: ExitStack = field(default_factory=ExitStack)


def add_sae(
    model: HookedModel, sae: SAE[Any], use_error_term: bool | None = None, tokens: Tokens = "all"
) -> None:
    """Attaches an SAE until `reset_saes`, instead of one that is attached there.

    `tokens` are the roles of the positions it replaces; the rest stays as it is.

    Raises: MissingSiteError for an unknown hook; InputError for a wrong width, at the first run.
    """
    sae_site = check_fit(model, sae)
    out = find_site(model, sae.cfg.metadata.hook_name_out or sae_site.site.name)
    if sae_site.minus is not None:
        raise InputError(f"{sae_site.name} is an update's SAE: use splice(...) and model.run(edit=...).")
    attached = _attached(model)
    if sae_site.site.name in attached:
        attached.pop(sae_site.site.name).stack.close()
    use = sae.use_error_term if use_error_term is None else use_error_term
    wrapper = _SAEWrapper(sae, use_error_term=use)
    new = _Attached(sae, wrapper, use_error_term, tokens)

    def put(point: Any, args: Any, value: Tensor) -> Tensor:
        flat = out.flatten(value)
        encoded = flat if wrapper._captured_input is None else wrapper._captured_input
        _check_width(sae, encoded, sae_site)
        wrapper.set_token_mask(_token_mask(model, out, tokens, flat))
        try:
            return out.unflatten(wrapper(flat).to(value.dtype), value)
        finally:
            wrapper.set_token_mask(None)

    def capture(point: Any, args: Any, value: Tensor) -> None:
        wrapper.capture_input(sae_site.flatten(value))

    if out.site.name != sae_site.site.name:
        _on(model, new.stack, sae_site.site.name, capture)
    _on(model, new.stack, out.site.name, put)
    attached[sae_site.site.name] = new


def reset_saes(model: HookedModel, act_names: str | Sequence[str] | None = None) -> None:
    """Takes off the SAEs of these sites, or all of them."""
    attached = _attached(model)
    names = list(attached) if act_names is None else [act_names] if isinstance(act_names, str) else act_names
    for name in names:
        if name in attached:
            attached.pop(name).stack.close()


@contextmanager
def saes(
    model: HookedModel,
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    tokens: Tokens = "all",
) -> Iterator[HookedModel]:
    """The model with these SAEs attached, and afterwards as it was."""
    attached = [saes] if isinstance(saes, SAE) else list(saes)
    names = [check_fit(model, sae).site.name for sae in attached]
    before = {name: _attached(model).get(name) for name in names}
    try:
        for sae in attached:
            add_sae(model, sae, use_error_term, tokens)
        yield model
    finally:
        if reset_saes_end:
            reset_saes(model, names)
            for old in before.values():
                if old is not None:
                    add_sae(model, old.sae, old.use_error_term, old.tokens)


def acts_to_saes(model: HookedModel) -> dict[str, SAE[Any]]:
    """The attached SAEs by site."""
    return {name: one.sae for name, one in _attached(model).items()}


def run_with_saes(
    model: HookedModel,
    *args: Any,
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    tokens: Tokens = "all",
    **kwargs: Any,
) -> Any:
    """The model's output with the SAEs spliced in, as SAELens' verb of this name."""
    with _saes(model, saes, reset_saes_end, use_error_term, tokens), _inputs(model, args, kwargs):
        return model(*args, **kwargs)


def run_with_hooks_with_saes(
    model: HookedModel,
    *args: Any,
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    tokens: Tokens = "all",
    **kwargs: Any,
) -> Any:
    """As `run_with_saes`, with hooks on sites and on SAEs: "SITE.hook_sae_acts_post" are the latents."""
    with ExitStack() as stack:
        stack.enter_context(_saes(model, saes, reset_saes_end, use_error_term, tokens))
        stack.enter_context(_inputs(model, args, kwargs))
        points = _sae_points(model)
        plain = []
        for name, hook in fwd_hooks:
            if name in points:
                point = points[name]
                handle = point.register_forward_hook(lambda m, a, out, hook=hook: hook(out, hook=m))
                stack.callback(handle.remove)
            else:
                plain.append((name, hook))
        return model.run_with_hooks(*args, fwd_hooks=plain, **kwargs)


def run_with_cache_with_saes(
    model: HookedModel,
    *args: Any,
    saes: SAE[Any] | Sequence[SAE[Any]] = (),
    reset_saes_end: bool = True,
    use_error_term: bool | None = None,
    tokens: Tokens = "all",
    names_filter: Any = None,
    **kwargs: Any,
) -> Any:
    """The output and a cache that holds "SITE.hook_sae_input", "...acts_pre", "...acts_post", ... too."""
    keep = _filter(names_filter)
    latents: dict[str, list[Tensor]] = {}
    with ExitStack() as stack:
        stack.enter_context(_saes(model, saes, reset_saes_end, use_error_term, tokens))
        stack.enter_context(_inputs(model, args, kwargs))
        points = _sae_points(model)
        for name, point in points.items():
            if keep(name):
                note = lambda m, a, out, name=name: latents.setdefault(name, []).append(out.detach())  # noqa: E731
                stack.callback(point.register_forward_hook(note).remove)
        of_model = (
            names_filter
            if names_filter is None or callable(names_filter)
            else [
                n
                for n in ([names_filter] if isinstance(names_filter, str) else names_filter)
                if n not in points
            ]
        )
        output, cache = model.run_with_cache(*args, names_filter=of_model, **kwargs)
    for name, values in latents.items():
        is_looped = name.partition(".")[0] in model.loops()
        values = torch.stack(values) if is_looped else torch.cat(values)
        (cache if isinstance(cache, dict) else cache.cache_dict)[name] = values
    return output, cache


_saes = saes
_VERBS = (
    add_sae,
    reset_saes,
    saes,
    run_with_saes,
    run_with_hooks_with_saes,
    run_with_cache_with_saes,
)


def add_verbs() -> None:
    """Gives every HookedModel SAELens' verbs: `model.run_with_saes(...)`."""
    for verb in _VERBS:
        if getattr(HookedModel, verb.__name__, verb) is not verb:
            raise AttributeError(f"HookedModel.{verb.__name__} is there already.")
        setattr(HookedModel, verb.__name__, verb)
    HookedModel.acts_to_saes = property(acts_to_saes)  # type: ignore[attr-defined]


def _attached(model: HookedModel) -> dict[str, _Attached]:
    return model.__dict__.setdefault("_saes_attached", {})


def _sae_points(model: HookedModel) -> dict[str, Any]:
    return {
        f"{site}.{name}": point
        for site, one in _attached(model).items()
        for name, point in one.wrapper.named_children()
    }


@contextmanager
def _inputs(model: HookedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Remembers what the model is called with, for the roles of its positions."""
    model.__dict__["_saes_inputs"] = dict(kwargs)
    try:
        yield
    finally:
        model.__dict__.pop("_saes_inputs", None)


def _token_mask(model: HookedModel, sae_site: SAESite, tokens: Tokens, flat: Tensor) -> Tensor | None:
    """True where the SAE is not applied; None if it is applied everywhere."""
    if tokens == "all":
        return None
    inputs = model.__dict__.get("_saes_inputs")
    if inputs is None:
        raise InputError("tokens= needs to know the inputs: use run_with_saes, or splice(..., mask=...).")
    layout = layouts_of(model, inputs, [sae_site]).get(sae_site.site.tower)
    n_rows, n_pos = flat.shape[:2]
    if layout is not None and set([tokens] if isinstance(tokens, str) else tokens) == {"latent"}:
        n_rows = layout.n_rows  # Latents have the same positions in every row, whatever its text.
    mask = mask_of(layout, tokens, sae_site, n_rows, n_pos)
    return ~mask.repeat(len(flat) // n_rows, 1).to(flat.device)


def _on(model: HookedModel, stack: ExitStack, site: str, hook: Callable[..., Any]) -> None:
    point = model.points.by_name[site]
    handle = point.register_forward_hook(hook)
    stack.callback(point.refresh)
    stack.callback(handle.remove)


def _check_width(sae: SAE[Any], encoded: Tensor, sae_site: SAESite) -> None:
    if encoded.shape[-1] != sae.cfg.d_in:
        raise InputError(
            f"{sae_site.name} has {encoded.shape[-1]} numbers a position and this SAE takes {sae.cfg.d_in}. "
            "It was trained on another site or another model."
        )


def _filter(names: Any) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    if callable(names):
        keep: Any = names
        return keep
    kept = {names} if isinstance(names, str) else set(names)
    return lambda name: name in kept
