"""Interventions pyvene does not have: by SAE latents, on maps, in some steps, on several positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyvene as pv
from torch import Tensor, nn


class SAEIntervention(pv.SourcelessIntervention):
    """Replaces a value by an SAE's reconstruction with its latents changed, plus what it does not explain.

    `change` gets the latents, [..., latent], and returns them; with a source they are the source's
    where `latents` says.
    """

    def __init__(self, sae: Any, change: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"embed_dim": sae.cfg.d_in, "keep_last_dim": True} | kwargs)
        self.keep_last_dim = True
        self.sae, self.change = sae, change

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        acts = self.sae.encode(base)
        new = acts if self.change is None else self.change(acts)
        return (base + self.sae.decode(new) - self.sae.decode(acts)).to(base.dtype)


class SAEInterchange(pv.VanillaIntervention):
    """Sets some of an SAE's latents to what they are in the source; the rest of the value stays."""

    def __init__(self, sae: Any, latents: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**{"embed_dim": sae.cfg.d_in, "keep_last_dim": True} | kwargs)
        self.keep_last_dim = True
        self.sae, self.latents = sae, list(latents)

    def forward(self, base: Tensor, source: Any, subspaces: Any = None, **kwargs: Any) -> Tensor:
        acts, wanted = self.sae.encode(base), self.sae.encode(source)
        new = acts.clone()
        new[..., self.latents] = wanted[..., self.latents]
        return (base + self.sae.decode(new) - self.sae.decode(acts)).to(base.dtype)


class BoundlessPositions(pv.BoundlessRotatedSpaceIntervention):
    """pyvene's boundless subspace, of several positions at once: theirs takes one vector a row."""

    def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **kwargs: Any) -> Tensor:
        new = super().forward(base.flatten(0, -2), source.flatten(0, -2), subspaces, **kwargs)
        return new.reshape(base.shape)


class MapIntervention(nn.Module):
    """Gives an intervention a UNet's map, [batch, channel, height, width], as [batch, position, channel]."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.trainable = getattr(inner, "trainable", False)
        self.is_source_constant = inner.is_source_constant
        self.keep_last_dim, self.use_fast = True, False
        self.interchange_dim = None

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        rows = lambda x: None if x is None else x.flatten(2).transpose(1, 2)  # noqa: E731
        new = self.inner(rows(base), rows(source), subspaces)
        return new.transpose(1, 2).reshape(base.shape)


class StepGate(nn.Module):
    """Lets an intervention act in some steps of a sampling loop, on the conditional rows if asked.

    Counts its calls: one a step. `reset` before each run, or use `MMIntervenableModel` anew.
    """

    def __init__(self, inner: Any, steps: Iterable[int], half: slice | None = None) -> None:
        super().__init__()
        self.inner, self.steps = inner, frozenset(steps)
        # nn.Module's methods have this name too.
        self.__dict__["half"] = half
        self.trainable = getattr(inner, "trainable", False)
        self.is_source_constant = inner.is_source_constant
        self.keep_last_dim, self.use_fast = True, False
        self.interchange_dim = None
        self.step = 0

    def reset(self) -> None:
        self.step = 0

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        now, self.step = self.step, self.step + 1
        return self.inner(base, source, subspaces) if now in self.steps else base


# Those that can be saved, besides pyvene's.
OWN = {c.__name__: c for c in (BoundlessPositions, SAEIntervention, SAEInterchange)}
