"""Pictures drawn side by side, each row of the batch with changes of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mm_adapters import AttentionUnreachableError, Edit, InputError, Lens, Read

# From a row's own value and the values of all rows, its new value.
RowFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Change:
    """What happens to one conditional row at one site, at some steps (None: all)."""

    site: str
    row: int
    fn: RowFn
    steps: frozenset[int] | None = None


def edits(changes: Iterable[Change]) -> list[Edit]:
    """One edit for each site, which changes each row as it is told.

    Rows are changed from what they all were before the first change.
    """
    by_site: dict[str, list[Change]] = {}
    for change in changes:
        by_site.setdefault(change.site, []).append(change)
    return [Edit(site, _Stepping(own), rows="cond") for site, own in by_site.items()]


class _Stepping:
    """Applies the changes of one site; it is called once a step."""

    def __init__(self, changes: Sequence[Change]) -> None:
        self.changes = changes
        self.step = -1

    def __call__(self, value: Tensor) -> Tensor:
        self.step += 1
        now = [c for c in self.changes if c.steps is None or self.step in c.steps]
        if not now:
            return value
        new = value.clone()
        for change in now:
            new[change.row] = change.fn(new[change.row].clone(), value)
        return new


def check_each_step(seen: Mapping[str, int]) -> None:
    """Raises: AttentionUnreachableError if layers were seen at different numbers of steps.

    Text encoders run once, a denoiser's blocks at every step: unless a cache passes some of them over.
    """
    by_tower: dict[str, dict[str, int]] = {}
    for site, count in seen.items():
        by_tower.setdefault(site.partition(".")[0], {})[site] = count
    for counts in by_tower.values():
        most = max(counts.values())
        short = {site: count for site, count in counts.items() if count < most}
        if short:
            site, count = next(iter(short.items()))
            raise AttentionUnreachableError(
                f"{site} ran at {count} of {most} steps, so what was seen and changed is not the whole run: "
                "a cache passes blocks over. Switch it off (pipeline.transformer.disable_cache(), or "
                "remove the cache's hooks) and run again."
            )


def copied(donor: int, to: Sequence[int], source: Sequence[int], heads: Sequence[int] | None = None) -> RowFn:
    """Takes another row's values: its positions `source` at our positions `to`, [pos, head?, ...]."""

    def copy(own: Tensor, rows: Tensor) -> Tensor:
        given = rows[donor][list(source)]
        if heads is None:
            own[list(to)] = given
            return own
        part = own[list(to)]
        part[:, list(heads)] = given[:, list(heads)]
        own[list(to)] = part
        return own

    return copy


def copied_whole(donor: int, heads: Sequence[int] | None = None) -> RowFn:
    """Takes another row's value, or that of some heads, [pos, head, ...]."""

    def copy(own: Tensor, rows: Tensor) -> Tensor:
        if heads is None:
            return rows[donor].clone()
        own[:, list(heads)] = rows[donor][:, list(heads)]
        return own

    return copy


def draw(
    model: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    changes: Iterable[Change] = (),
    *,
    read: Sequence[Read] = (),
    options: Mapping[str, Any] | None = None,
    lens: Lens | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """The pictures of these prompts, 0..1, each from its seed's noise.

    Raises: InputError if prompts and seeds differ in number, or options say what these arguments say.
    """
    given = dict(options or {})
    taken = sorted(set(given) & {"prompt", "seed", "num_images_per_prompt", "output_type"})
    if taken:
        raise InputError(f"The options hold {', '.join(taken)}, which cases and seeds say here.")
    inputs = {**given, "prompt": list(prompts), "seed": list(seeds), "output_type": "pt"}
    if len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds: give a seed for each.")
    run = (lens or model).run(inputs, read=read, edit=edits(changes))
    check_each_step({r.site: r.fired for r in run.receipts})
    images = run.output.images
    if not bool(torch.isfinite(images).all()):
        raise InputError("A picture holds NaN: a step broke down. Run it in float32 or bfloat16.")
    return images.float()
