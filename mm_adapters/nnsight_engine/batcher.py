"""The rows of each invoke in a value, when several invokes share one run.

nnsight 0.8.1 (intervention/batching.py) knows one row axis. Here images and texts are two, a
denoiser's rows are its pictures once for each part of the guidance, and modelling code that folds
heads into the rows is unfolded. Which axis a value has follows from where it is, not from its size;
where it cannot be told, that is an error and not the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from nnsight.intervention.batching import Batcher
from torch import Tensor

from mm_adapters._errors import InputError

Span = tuple[int, int]
MIXED = "mixed"


@dataclass(frozen=True)
class Axis:
    """The rows of a value: their axis, the parts that guidance makes of them, the heads folded into them."""

    name: str
    parts: Callable[[], int] = lambda: 1
    n_heads: int = 1


# transformers 5.24: a picture's or video's features each, in a list (`image_outputs.pooler_output`).
_ONE_EACH = ("pooler_output",)


class RowBatcher(Batcher):
    """Gives each invoke its rows of a value, and puts an edit of them back."""

    def __init__(self, envoy: Any, kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(envoy, kwargs)
        self.sizes: list[dict[str, int]] = []
        self._where = ""
        self._axis = Axis(MIXED)
        self._named: tuple[str, ...] | None = None
        self._served: tuple[Any, Any] = (None, None)

    def add(self, *inputs: Any, **kwargs: Any) -> list[int] | None:
        """As nnsight's; a group is [number of the invoke, 1], its rows are in `sizes`."""
        if not self.envoy._batch_size(*inputs, **kwargs):
            self.extra_kwargs.update(kwargs)
            return None
        arguments = self.envoy.arguments(inputs, kwargs)
        self.invokes.append(((), arguments))
        self.sizes.append(self.envoy.rows.count(arguments, self.kwargs))
        self.total += 1
        return [len(self.sizes) - 1, 1]

    def locate(self, location: str) -> None:
        """Sets the location of the next values, in a run of several invokes."""
        self._where, self._axis = location, self.envoy.rows.axis(location)

    def check_rows(self, group: list[int] | None, location: str, what: str) -> None:
        """Raises: InputError if an invoke has no rows of its own at a location."""
        axis = self.envoy.rows.axis(location).name
        if self.batching and group is not None and not self.sizes[group[0]].get(axis, 1):
            raise InputError(f"{what}: this invoke gave no {axis}, so none of the rows there is its own.")

    def narrow(self, value: Any, group: Any) -> Any:
        if not self.batching or group is None:
            return value
        if _has_entries(value):
            return _rebuilt(value, lambda key, item: self._entry(key, item, group))
        narrowed = super().narrow(value, group)
        self._served = (narrowed, value)
        return narrowed

    def widen(self, full: Any, group: Any, edited: Any) -> Any:
        # A value that was only read goes back as the same object: a copy would round a residual differently.
        if edited is self._served[0] and full is self._served[1]:
            return full
        if self.batching and group is not None and _has_entries(full):
            return _rebuilt(full, lambda key, item: self._entry(key, item, group, edited[key]))
        return super().widen(full, group, edited)

    def _entry(self, key: str, item: Any, group: list[int], edited: Any = None) -> Any:
        """One entry of an output, narrowed; or with `edited` put back into it."""
        self._named = self.envoy.rows.entry(key) if self.envoy.rows.is_output(self._where) else None
        try:
            return self._of_entry(key, item, group, edited)
        finally:
            self._named = None

    def _of_entry(self, key: str, item: Any, group: list[int], edited: Any) -> Any:
        if _has_entries(item):  # An encoder's own output, within the model's.
            return _rebuilt(
                item, lambda k, v: self._of_entry(k, v, group, None if edited is None else edited[k])
            )
        one_each = key in _ONE_EACH and isinstance(item, list | tuple)
        if one_each or isinstance(item, np.ndarray) or (isinstance(item, list) and not _has_tensors(item)):
            axis = self._named[0] if self._named else self._axis.name
            (start, size), total = self._span(group, axis), self._total(axis)
            if len(item) != total:
                return item if edited is None else edited
            if edited is None:
                return item[start : start + size]
            new = item.copy() if isinstance(item, np.ndarray) else list(item)
            new[start : start + size] = edited
            return tuple(new) if isinstance(item, tuple) else new
        if edited is None:
            return super().narrow(item, group)
        return super().widen(item, group, edited)

    def _narrow_tensor(self, tensor: Tensor, group: list[int]) -> Tensor:
        for dim, spans in self._cuts(tensor, group):
            if len(spans) == 1:
                tensor = tensor.narrow(dim, *spans[0])
                tensor._nnsight_batch = True  # type: ignore[attr-defined]
            else:
                tensor = torch.cat([tensor.narrow(dim, *span) for span in spans], dim)
        return tensor

    def _widen_tensor(self, full: Tensor, group: list[int], edited: Tensor) -> Tensor:
        cuts = self._cuts(full, group)
        if not cuts:
            return edited
        index = torch.meshgrid(*(_positions(full, dim, spans) for dim, spans in cuts), indexing="ij")
        return full.index_put(tuple(index), edited.to(full.dtype))

    def _cuts(self, tensor: Tensor, group: list[int]) -> list[tuple[int, list[Span]]]:
        if not tensor.ndim:
            return []
        if self._named is not None:
            return [self._named_cut(tensor, dim, axis, group) for dim, axis in enumerate(self._named)]
        if self._axis.name == MIXED:
            return self._cuts_by_size(tensor, group)
        parts, total, n = self._axis.parts(), self._total(), tensor.shape[0]
        (start, size), heads = self._span(group), self._axis.n_heads
        for fold in dict.fromkeys((1, heads)):
            if total and n == parts * total * fold:
                spans = [((p * total + start) * fold, size * fold) for p in range(parts)]
                return [(0, spans)]
        if total and n == total:  # Before guidance doubles the rows.
            return [(0, [(start, size)])]
        if n <= 1 or tensor.ndim == 1:
            return []  # One for all rows.
        raise InputError(
            f"{self._where} has {n} rows; this run has {total} {self._axis.name}"
            + (f" in {parts} parts" if parts > 1 else "")
            + ". Which rows are this invoke's cannot be told: read it in a run of one invoke."
        )

    def _named_cut(self, tensor: Tensor, dim: int, axis: str, group: list[int]) -> tuple[int, list[Span]]:
        n, total = tensor.shape[dim], self._total(axis)
        if not total or n % total:
            raise InputError(f"{self._where} has {n} rows in an entry of {total} {axis}: whose are they?")
        # Tokens of images may stand one after another.
        (start, size), fold = self._span(group, axis), n // total
        return dim, [(start * fold, size * fold)]

    def _cuts_by_size(self, tensor: Tensor, group: list[int]) -> list[tuple[int, list[Span]]]:
        """The cuts of a value of one of two axes. Its size tells which; if it does not, that is an error."""
        axes = list(self.sizes[group[0]])
        spans = {a: self._span(group, a) for a in axes}
        totals = {a: self._total(a) for a in axes}
        square = tensor.ndim == 2 and len(axes) == 2 and set(tensor.shape) <= set(totals.values())
        cuts: list[tuple[int, list[Span]]] = []
        for dim in range(2 if square else 1):
            fits = [a for a in axes if totals[a] and totals[a] == tensor.shape[dim]]
            if len({spans[a] for a in fits}) > 1:
                raise InputError(
                    f"{self._where} has {tensor.shape[dim]} rows, and this run has as many "
                    f"{' as '.join(fits)}, divided otherwise among its invokes. Read a site of one "
                    "tower, or give each invoke as many of the one as of the other."
                )
            if fits:
                cuts.append((dim, [spans[fits[0]]]))
        return cuts

    def _total(self, axis: str | None = None) -> int:
        return sum(s.get(axis or self._axis.name, 0) for s in self.sizes)

    def _span(self, group: list[int], axis: str | None = None) -> Span:
        name = axis or self._axis.name
        before = sum(s.get(name, 0) for s in self.sizes[: group[0]])
        return before, self.sizes[group[0]].get(name, 0)


def _positions(full: Tensor, dim: int, spans: list[Span]) -> Tensor:
    ranges = [torch.arange(start, start + size, device=full.device) for start, size in spans]
    return torch.cat(ranges)


def _has_tensors(items: list[Any]) -> bool:
    return any(isinstance(item, Tensor) for item in items)


def _has_entries(value: Any) -> bool:
    return isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type))


def _rebuilt(value: Any, fn: Callable[[str, Any], Any]) -> Any:
    """An output object of transformers or diffusers with each entry replaced.

    diffusers' own copy() fails: its outputs have entries that must be given (0.42,
    utils/outputs.py, BaseOutput).
    """
    if is_dataclass(value):
        entries = {f.name: getattr(value, f.name) for f in fields(value)}
        return type(value)(**{k: v if v is None else fn(k, v) for k, v in entries.items()})
    new = value.copy()  # type: ignore[attr-defined]
    for key, item in value.items():
        new[key] = fn(key, item)
    return new
