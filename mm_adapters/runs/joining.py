"""The values of a run's calls as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_adapters._errors import InputError
from mm_adapters.records.spec import Site
from mm_adapters.runs.lens import Call

# What a later key holds in an earlier call, which had not got so far.
_NOT_YET = {"hook_pattern": 0.0, "hook_attn_scores": -torch.inf}


@dataclass(frozen=True)
class Value:
    """What one call of a tower gave: which call, which part of its evaluation, how many positions before."""

    tensor: Tensor
    call: Call
    part: int
    n_before: int


def of_loop(site: Site, values: Sequence[Value]) -> tuple[Tensor, tuple[Call, ...]]:
    """[call, row, ...] and which call each is.

    The parts of one evaluation are rows of one call, and so is what a module gives that is called for some
    of the rows at a time.
    """
    joined: list[list[Value]] = []
    for i, value in enumerate(values):
        before = values[i - 1]
        if i and value.call == before.call and value.part >= before.part:
            joined[-1].append(value)
        else:
            joined.append([value])
    for parts in joined:
        if len({value.tensor.shape[1:] for value in parts}) > 1:
            raise InputError(
                f"{site.name}: the calls of one step have {_shapes(parts)}, for their prompts differ in "
                'length. Read rows="cond" or rows="uncond", or reduce them to one shape.'
            )
    first = [parts[0] for parts in joined]
    tensors = [_along([v.tensor for v in parts], 0) for parts in joined]
    if len({tuple(t.shape) for t in tensors}) > 1:
        shapes = " and ".join(dict.fromkeys(str(list(t.shape)) for t in tensors))
        raise InputError(
            f"{site.name} has the shapes {shapes} at different calls: guidance adds or drops rows on the "
            "way, or a guider calls once more. Read the calls= or steps= that are alike, a part by rows=, or "
            "reduce them to one shape."
        )
    return torch.stack(tensors), tuple(value.call for value in first)


def of_calls(site: Site, values: Sequence[Value], *, packed: bool = False) -> Tensor:
    """The rows of all calls, one after the other; of packed rows, their positions.

    Raises: InputError if the calls differ in more than rows.
    """
    tensors = [value.tensor for value in values]
    axis = 1 if packed else 0
    rests = {(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors}
    if len(rests) > 1:
        raise InputError(
            f"{site.name} was called {len(values)} times, with {_shapes(values)}, which are no rows of one "
            "value. Read one of the calls with steps=, or reduce them to one shape."
        )
    return _along(tensors, axis)


def of_generation(site: Site, values: Sequence[Value]) -> Tensor:
    """A generation's values along the sequence: each position's from the last call that computed it.

    Raises: InputError for a site whose values have no axis of positions, or whose keys are dropped.
    """
    leaf = site.part.rpartition(".")[2]
    axis = next((i for i, name in enumerate(site.axes) if name in ("pos", "query")), None)
    if len(values) == 1:
        return values[0].tensor
    if axis is None:
        raise InputError(
            f"{site.name} has no axis of positions, [{', '.join(site.axes)}], along which the calls of a "
            "generation would join. Reduce it, which keeps the calls apart, or read one with steps=."
        )
    if leaf in _NOT_YET:
        values = _with_all_keys(site, values, _NOT_YET[leaf])
    joined, n_before = values[0].tensor, values[0].n_before
    for value in values[1:]:
        # Without a cache each call computes all positions anew; a draft that was refused is computed again.
        kept = min(max(value.n_before - n_before, 0), joined.shape[axis])
        joined = torch.cat([joined.narrow(axis, 0, kept), value.tensor], axis)
    return joined


def by_call(site: Site, values: Sequence[Value]) -> Tensor:
    """[call, ...]: what was reduced at each call of a generation. Raises: InputError if shapes differ."""
    if len({tuple(v.tensor.shape) for v in values}) > 1:
        raise InputError(
            f"{site.name}: the reduce gave {_shapes(values)} at the calls of this generation. Reduce them to "
            "one shape, or read some of them with steps=."
        )
    return torch.stack([value.tensor for value in values])


def _with_all_keys(site: Site, values: Sequence[Value], fill: float) -> list[Value]:
    n_keys = [value.tensor.shape[-1] for value in values]
    ends = [value.n_before + value.tensor.shape[-2] for value in values]
    if n_keys != ends:
        raise InputError(
            f"{site.name}: this cache holds other keys at each call, so its patterns do not join. Reduce it, "
            "or read one call with steps=."
        )
    most = max(n_keys)
    return [
        Value(F.pad(v.tensor, (0, most - n), value=fill), v.call, v.part, v.n_before)
        for v, n in zip(values, n_keys, strict=True)
    ]


def _along(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def _shapes(values: Sequence[Value]) -> str:
    return " and ".join(dict.fromkeys(str(list(value.tensor.shape)) for value in values))
