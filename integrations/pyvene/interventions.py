"""Interventions pyvene does not have: by SAE latents, and boundless ones on several positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyvene as pv
from torch import Tensor

from integrations.pyvene.gates import MapIntervention, StepGate
from integrations.pyvene.options import check_options
from mm_adapters import InputError

__all__ = ["BoundlessPositions", "MapIntervention", "SAEInterchange", "SAEIntervention", "StepGate"]


class SAEIntervention(pv.SourcelessIntervention):
    """Replaces a value by an SAE's reconstruction with its latents changed, plus what it does not explain.

    `change` gets the latents, [..., latent], and returns them changed.

    Raises: InputError for an option that it does not have.
    """

    def __init__(self, sae: Any, change: Callable[[Tensor], Tensor] | None = None, **options: Any) -> None:
        _check(type(self), sae, options)
        super().__init__(**{"embed_dim": sae.cfg.d_in} | options | {"keep_last_dim": True})
        self.sae, self.change = sae, change

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """The base, with its latents changed."""
        refuse_subspaces(self, subspaces)
        acts = self.sae.encode(base)
        new = acts if self.change is None else self.change(acts)
        return (base + self.sae.decode(new) - self.sae.decode(acts)).to(base.dtype)


class SAEInterchange(pv.VanillaIntervention):
    """Sets some of an SAE's latents to what they are in the source; the rest of the value stays.

    Raises: InputError for an option that it does not have, or a latent that the SAE does not have.
    """

    def __init__(self, sae: Any, latents: Sequence[int], **options: Any) -> None:
        _check(type(self), sae, options)
        unknown = [latent for latent in latents if not 0 <= latent < sae.cfg.d_sae]
        if unknown or not len(latents):
            raise InputError(f"latents={list(latents)}: this SAE has latents 0 to {sae.cfg.d_sae - 1}.")
        super().__init__(**{"embed_dim": sae.cfg.d_in} | options | {"keep_last_dim": True})
        self.sae, self.latents = sae, list(latents)

    def forward(self, base: Tensor, source: Any, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """The base, with some latents of the source."""
        refuse_subspaces(self, subspaces)
        if self.source_representation is not None:
            source = self.source_representation
        acts, source_acts = self.sae.encode(base), self.sae.encode(source)
        new = acts.clone()
        new[..., self.latents] = source_acts[..., self.latents]
        return (base + self.sae.decode(new) - self.sae.decode(acts)).to(base.dtype)


class BoundlessPositions(pv.BoundlessRotatedSpaceIntervention):
    """pyvene's boundless subspace, of several positions at once: theirs takes one vector a row."""

    def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **kwargs: Any) -> Tensor:
        """The base, with the learned subspace of the source."""
        refuse_subspaces(self, subspaces)
        new = super().forward(base.flatten(0, -2), source.flatten(0, -2), subspaces, **kwargs)
        return new.reshape(base.shape)


def refuse_subspaces(intervention: Any, subspaces: Any) -> None:
    """Raises: InputError if subspaces are given to an intervention that has one of its own, or none."""
    if subspaces is not None and isinstance(intervention, _WITHOUT_SUBSPACES):
        raise InputError(f"A {type(intervention).__name__} takes no subspaces; pass None for it.")


def _check(kind: type, sae: Any, options: dict[str, Any]) -> None:
    check_options(kind, options)
    for name, fixed in (("keep_last_dim", True), ("embed_dim", sae.cfg.d_in)):
        if int(options.get(name, fixed)) != fixed:
            raise InputError(f"{kind.__name__}: {name} is {fixed} for this SAE, not {options[name]}.")
    for name in ("subspace_partition", "source_representation", "hidden_source_representation"):
        if options.get(name) is not None and not (name == "source_representation" and kind is SAEInterchange):
            raise InputError(f"A {kind.__name__} does not use {name}.")


# Those that can be saved, besides pyvene's.
OWN = {c.__name__: c for c in (BoundlessPositions, SAEIntervention, SAEInterchange)}
# pyvene's learn their own; it hands subspaces on to them, and they do not look at them.
_WITHOUT_SUBSPACES = (
    *OWN.values(),
    pv.BoundlessRotatedSpaceIntervention,
    pv.SigmoidMaskRotatedSpaceIntervention,
)
