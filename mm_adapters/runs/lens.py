"""The protocol that methods are written against: read sites, edit sites, get receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

Rows = Literal["all", "cond", "uncond", "image"] | slice | Sequence[int]
Steps = Iterable[int] | None


@dataclass(frozen=True)
class Read:
    """Asks for one site's value.

    `reduce` folds each value down as it appears; what it returns is all that is kept. `steps`
    are the sampling steps wanted (None: all), `rows` the rows of the batch: a slice, indices, or
    "cond"/"uncond" (and "image", where a picture guides alone) under classifier-free guidance.
    """

    site: str
    reduce: Callable[[Tensor], Tensor] | None = None
    steps: Steps = None
    rows: Rows = "all"


@dataclass(frozen=True)
class Edit:
    """Replaces one site's value by `fn(value)`, which must keep its shape.

    `steps` and `rows` as in `Read`. `positions` are absolute positions in the sequence: `fn` gets
    only those, and none of them is touched in a call that does not hold it (as with a KV cache).
    """

    site: str
    fn: Callable[[Tensor], Tensor]
    steps: Steps = None
    rows: Rows = "all"
    positions: Sequence[int] | None = None


@dataclass(frozen=True)
class Receipt:
    """What an edit did: how often it fired, and by how much it moved its site.

    `moved` is the root mean square of the change divided by that of the value, over all firings.
    """

    site: str
    fired: int
    moved: float


@dataclass(frozen=True)
class Run:
    """What a run gave. `values` and `grads` are keyed by site name.

    A value is [batch, ...]; at the sites of a sampling loop it is [step, batch, ...]. `rows` says
    which rows of each tower are which part of classifier-free guidance, `guidance` by which numbers the
    pipeline was guided, by its arguments' names.
    """

    output: Any
    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    receipts: tuple[Receipt, ...] = ()
    rows: Mapping[str, Mapping[str, slice]] = field(default_factory=dict)
    guidance: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        return self.values[site]


@runtime_checkable
class Lens(Protocol):
    """A model whose sites can be read and edited; HookedModel and TracedModel are two of them."""

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        read: Iterable[str | Read] = (),
        edit: Iterable[Edit] = (),
        grad_of: Callable[[Any], Tensor] | None = None,
    ) -> Run:
        """One forward, or one sampling loop: what is read, with what was edited, and how far edits moved it.

        `grad_of` is a scalar function of the output; its gradients at the read sites come back too.

        Raises: MissingSiteError before anything runs; EditNeverFiredError if an edit touched nothing.
        """
        ...


def as_read(item: str | Read) -> Read:
    """A `Read` for a name or a `Read`."""
    return Read(item) if isinstance(item, str) else item
