"""The protocol that methods are written against: read sites, edit sites, get receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.runs.indices import Rows, counted_from_zero, row_numbers, whole_numbers

Steps = Iterable[int] | None


class Call(NamedTuple):
    """Which call of a tower a value is of: the step, and its number among the calls of that step.

    A step is the pipeline's own. Most samplers call the denoiser once a step; those of second order do
    twice, and some guiders call it once more. Outside sampling loops each call is a step of its own.
    """

    step: int
    order: int


@dataclass(frozen=True)
class Read:
    """Asks for one site's value.

    Args:
        site: The site's name.
        reduce: Folds each value down as it appears; what it returns is all that is kept. It may write into
            the value that it is given. If it has a parameter named `call` it is given the value's `Call`.
        steps: The sampling steps wanted, counted from 0 (None: all), each with all its calls.
        rows: The rows of the batch: a slice or numbers (negative ones from the last), or "cond"/"uncond"
            (and "image" or "perturbed", where a picture guides alone, or an attention without its map)
            under classifier-free guidance.
        calls: The calls wanted of each step, counted from 0 (None: all).
        grad: Whether a run with `grad_of` gives the gradient at this site. A reduced value has none.

    Numbers may come as a list, range, set, generator, array or tensor of integers.

    Raises: InputError for what can be no rows, steps or calls.
    """

    site: str
    reduce: Callable[..., Tensor] | None = None
    steps: Steps = None
    rows: Rows = "all"
    calls: Steps = None
    grad: bool = True

    def __post_init__(self) -> None:
        """Makes numbers tuples, so that a generator lasts for more than one run."""
        _plain_numbers(self)
        _check_callable(f"The reduce of a read of {self.site}", self.reduce, optional=True)


@dataclass(frozen=True)
class Edit:
    """Replaces one site's value by `fn(value)`, a tensor of the same shape without new NaNs.

    Args:
        site: The site's name.
        fn: The new value of a value. It may write into the value that it is given, if it returns it. If it
            has a parameter named `call` it is given the value's `Call`.
        steps: As in `Read`.
        rows: As in `Read`.
        positions: Positions in the sequence, negative ones from its end: `fn` gets only those. With a KV
            cache they count from the start of the text, and a call that does not hold one leaves it alone.
        calls: As in `Read`.

    Raises: InputError for what can be no rows, steps, positions or calls.
    """

    site: str
    fn: Callable[..., Tensor]
    steps: Steps = None
    rows: Rows = "all"
    positions: Sequence[int] | None = None
    calls: Steps = None

    def __post_init__(self) -> None:
        """Makes numbers tuples, so that a generator lasts for more than one run."""
        _plain_numbers(self)
        _check_callable(f"The edit of {self.site}", self.fn, optional=False)
        if self.positions is not None:
            positions = whole_numbers(f"{self.site}: positions", self.positions)
            object.__setattr__(self, "positions", positions)


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

    A value is [batch, ...]; at the sites of a sampling loop it is [call, batch, ...], the denoiser's calls in
    order, and `calls` says which call each is. Where guidance calls it once for each of its parts, those are
    rows of one call. `rows` says which rows of each tower are which part of classifier-free guidance,
    `guidance` by which numbers the pipeline was guided, by its arguments' names. `unused` are the sites that
    the scalar of `grad_of` does not depend on, whose gradients are zero.
    """

    output: Any
    values: Mapping[str, Tensor]
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    receipts: tuple[Receipt, ...] = ()
    rows: Mapping[str, Mapping[str, slice]] = field(default_factory=dict)
    guidance: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, tuple[Call, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

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

        Raises: MissingSiteError, InputError before anything runs; EditNeverFiredError, ReadNeverFiredError
        if an edit or read, or a part of it, never came up.
        """
        ...


def as_inputs(given: Any) -> dict[str, Any]:
    """A model's arguments by name. Raises: InputError for what is no mapping of names."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InputError(
            f"inputs={given!r:.80}: they are a dictionary of the model's own arguments by name, or of raw "
            "text and images."
        )
    return dict(given)


def as_reads(given: Any) -> list[Read]:
    """The reads of a list of names and `Read`s. Raises: InputError for anything else."""
    listed = _listed("read", given, "site names and Reads")
    for item in listed:
        if not isinstance(item, str | Read):
            raise InputError(f"read holds {item!r}. It takes site names and Reads.")
    return [Read(item) if isinstance(item, str) else item for item in listed]


def as_edits(given: Any) -> list[Edit]:
    """The edits of a list. Raises: InputError for anything else."""
    listed = _listed("edit", given, "Edits")
    for item in listed:
        if not isinstance(item, Edit):
            raise InputError(f"edit holds {item!r}. It takes Edits: Edit(site, fn).")
    return listed


def _listed(name: str, given: Any, of: str) -> list[Any]:
    if isinstance(given, str | Read | Edit) or not isinstance(given, Iterable):
        raise InputError(f"{name}={given!r}: it takes a list of {of}. Put it in brackets.")
    return list(given)


def _check_callable(what: str, given: Any, *, optional: bool) -> None:
    if not (callable(given) or (optional and given is None)):
        raise InputError(f"{what} is {given!r}. It is a function of the value.")


def _plain_numbers(asked: Read | Edit) -> None:
    site = asked.site
    if not isinstance(site, str):
        raise InputError(f"{type(asked).__name__}({site!r}): a site is given by its name.")
    object.__setattr__(asked, "rows", row_numbers(f"{site}: rows", asked.rows))
    object.__setattr__(asked, "steps", counted_from_zero(f"{site}: steps", asked.steps))
    object.__setattr__(asked, "calls", counted_from_zero(f"{site}: calls", asked.calls))
