"""TransformerLens' points inside an attention, made of sites: each head's result and each head's inputs.

No module of the model computes them. A point's value is computed from sites, and what its hooks change is
carried on to the sites behind. They are there while the tower's `set_use_...` asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.hooks.point import check_like, show, tracked
from mm_adapters.tl_engine.hook_point import LivePoint, SitePoint

Weights = Callable[[], dict[str, Callable[[], Tensor]]]
# How far, of its own size, a projection may be from the model's: another order of the same sums.
_AS_THE_MODEL = 0.02


class DerivedPoint(LivePoint):
    """A HookPoint whose value is computed from sites. `on` puts what computes it on those sites."""

    def __init__(self, name: str, layer: int | None, on: Callable[[], Any]) -> None:
        super().__init__()
        self.__dict__.update(shown_name=name, in_layer=layer, on=on, active=None)

    shown_name: str
    in_layer: int | None
    on: Callable[[], Any]
    active: ExitStack | None

    def layer(self) -> int:
        """The layer, counted within the tower."""
        if self.in_layer is None:
            raise InputError(f"{self.shown_name} belongs to no layer.")
        return self.in_layer

    def refresh(self) -> None:
        """Watches its sites while it has an active hook."""
        live = bool(self._forward_hooks or self._backward_hooks)
        if live and self.active is None:
            stack = ExitStack()
            stack.enter_context(self.on())
            self.__dict__["active"] = stack
        elif not live and self.active is not None:
            self.active.close()
            self.__dict__["active"] = None

    def shown(self, x: Tensor) -> tuple[Tensor, bool]:
        """What its hooks make of a value, and whether that must be carried on."""
        new, changed = show(self, x)
        check_like(self.shown_name, x, new)
        return new, changed or tracked(new)

    def __call__(self, x: Tensor) -> Any:
        return self._call_impl(x)

    @property
    def site(self) -> Any:
        return None

    @property
    def live(self) -> bool:
        return self.active is not None

    @property
    def module_hooks(self) -> list[Any]:
        return []

    def move(self, site: Any) -> None:
        """It has no module hooks of its own."""

    def watch_again(self) -> None:
        """Watches what is there now, after modules were put in place of others."""
        if self.active is not None:
            self.active.close()
            self.__dict__["active"] = None
            self.refresh()


class HeadResults:
    """`attn.hook_result`, [batch, pos, head, d_model]: what each head adds to the stream, less the bias."""

    def __init__(self, name: str, z: SitePoint, out: SitePoint, weights: Weights) -> None:
        self._z, self._out, self._weights = z, out, weights
        self._held: list[Tensor] = []
        self.point = DerivedPoint(name, z.layer(), self._watch)

    @contextmanager
    def _watch(self) -> Iterator[None]:
        with self._z.changed(last=self._hold), self._out.changed(first=self._carry_on):
            yield

    def _hold(self, z: Tensor) -> Tensor:
        self._held = [z]
        return z

    def _carry_on(self, attn_out: Tensor) -> Tensor:
        if not self._held:
            return attn_out
        result = einsum(self._held.pop(), self._weights()["W_O"](), "b p h d, h d m -> b p h m")
        total = result.sum(-2)  # First: a hook may write into it.
        new, changed = self.point.shown(result)
        return attn_out + (new.sum(-2) - total) if changed else attn_out


class HeadInputs:
    """`hook_attn_in` and `hook_q_input`, `hook_k_input`, `hook_v_input`, [batch, pos, head, d_model].

    Each head's own copy of the stream before the norm. What a hook changes there goes through the norm and
    the head's projection, and moves that head's q, k or v.

    Args:
        name: The block's, as in a site's name.
        stream: The point of `hook_resid_pre`.
        projected: The points of q, k and v.
        weights: Gives the attention's.
        norm: The norm before the attention, called without its hooks; the identity if there is none.
    """

    def __init__(
        self,
        name: str,
        stream: SitePoint,
        projected: dict[str, SitePoint],
        weights: Weights,
        norm: Callable[[Tensor], Tensor],
    ) -> None:
        self._name, self._stream, self._projected = name, stream, projected
        self._weights, self._norm = weights, norm
        self._x: list[Tensor] = []
        self._edited: dict[str, Tensor] = {}
        self._n_on = 0
        self._stack = ExitStack()
        layer = stream.layer()
        self.attn_in = DerivedPoint(f"{name}.hook_attn_in", layer, self._watch)
        self.inputs = {
            letter: DerivedPoint(f"{name}.hook_{letter}_input", layer, self._watch) for letter in projected
        }

    @contextmanager
    def _watch(self) -> Iterator[None]:
        """Several points share what is on the sites."""
        self._n_on += 1
        if self._n_on == 1:
            self._stack.enter_context(self._stream.changed(last=self._hold))
            for letter, point in self._projected.items():
                change = self._carry_on(letter)
                self._stack.enter_context(point.changed(first=change))
        try:
            yield
        finally:
            self._n_on -= 1
            if not self._n_on:
                self._stack.close()

    def _n_heads(self, letter: str) -> int:
        return self._projected[letter].site.n_heads or 1

    def _hold(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise InputError(
                f"{self._name} has {tuple(x.shape)} at its input, not [batch, pos, d_model], so its heads' "
                "inputs cannot be told apart."
            )
        self._x, self._edited = [x], {}
        heads: dict[str, Float[Tensor, "batch pos head d_model"]] = {}
        changed = False
        if self.attn_in.live:
            shown = _for_heads(x, self._n_heads("q"))
            new, changed = self.attn_in.shown(shown)
            heads = dict.fromkeys(self.inputs, new)
        for letter, point in self.inputs.items():
            value = heads.get(letter)
            its_own = False
            if point.live:
                if value is None:
                    value = _for_heads(x, self._n_heads(letter))
                value, its_own = point.shown(value)
            if value is not None and (changed or its_own):
                self._edited[letter] = value
        return x

    def _carry_on(self, letter: str) -> Callable[[Tensor], Tensor]:
        def change(value: Tensor) -> Tensor:
            if letter not in self._edited:
                return value
            base = self._project(letter, _for_heads(self._x[0], self._n_heads(letter)))
            self._check(letter, base, value)
            return value + (self._project(letter, self._edited.pop(letter)) - base).to(value.dtype)

        return change

    def _project(self, letter: str, x: Tensor) -> Tensor:
        n, weight = self._n_heads(letter), self._weights()[f"W_{letter.upper()}"]()
        bias = self._weights()[f"b_{letter.upper()}"]()
        group = weight.shape[0] // n  # Each head of a group has the group's weights.
        return einsum(self._norm(x), weight[::group], "b p h m, h m d -> b p h d") + bias[::group]

    def _check(self, letter: str, base: Tensor, value: Tensor) -> None:
        off = float((base - value).detach().abs().max()) if base.shape == value.shape else torch.inf
        if off > _AS_THE_MODEL * float(value.detach().abs().max()) + 1e-4:
            raise InputError(
                f"{self._name}.hook_{letter}_input cannot be edited: this model's {letter} is not the "
                "projection of its normalised stream alone. Edit "
                f"{self._projected[letter].site.name} itself."
            )


def _for_heads(x: Float[Tensor, "batch pos d_model"], n: int) -> Float[Tensor, "batch pos head d_model"]:
    """A copy for each head: a hook may write into one."""
    return repeat(x, "b p m -> b p h m", h=n).clone()
