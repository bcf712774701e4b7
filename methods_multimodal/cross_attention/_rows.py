"""Pictures generated side by side, each row of the batch with edits of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.diffusion.pictures import check_pictures, pictures_of
from mm_adapters import AttentionUnreachableError, Call, Edit, InputError, Model, Read

# Takes a row's value and the values of all rows, gives the row's new value.
RowFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RowEdit:
    """Replaces one conditional row of one site by `fn(row, all rows)`, at some steps (None: all)."""

    site: str
    row: int
    fn: RowFn
    steps: frozenset[int] | None = None


def edits(row_edits: Iterable[RowEdit]) -> list[Edit]:
    """One edit for each site, which applies the edits of its rows.

    Each row edit sees all rows as they were before the first.
    """
    by_site: dict[str, list[RowEdit]] = {}
    for edit in row_edits:
        by_site.setdefault(edit.site, []).append(edit)
    return [Edit(site, _EachStep(of_site), rows="cond") for site, of_site in by_site.items()]


class _EachStep:
    """Applies the row edits of one site, at the steps of each."""

    def __init__(self, row_edits: Sequence[RowEdit]) -> None:
        self.row_edits = row_edits

    def __call__(self, value: Tensor, call: Call) -> Tensor:
        now = [e for e in self.row_edits if e.steps is None or call.step in e.steps]
        if not now:
            return value
        new = value.clone()
        for edit in now:
            new[edit.row] = edit.fn(new[edit.row].clone(), value)
        return new


def check_each_step(counts_by_site: Mapping[str, int]) -> None:
    """Raises: AttentionUnreachableError if layers ran at different numbers of steps.

    Text encoders run once, a denoiser's blocks at every step: unless a cache passes some of them over.
    """
    by_tower: dict[str, dict[str, int]] = {}
    for site, count in counts_by_site.items():
        by_tower.setdefault(site.partition(".")[0], {})[site] = count
    for counts in by_tower.values():
        most = max(counts.values())
        short = {site: count for site, count in counts.items() if count < most}
        if short:
            site, count = next(iter(short.items()))
            raise AttentionUnreachableError(
                f"{site} ran at {count} of {most} steps, so what was read and edited is not the whole run: "
                "a cache passes blocks over. Switch it off (pipeline.transformer.disable_cache(), or "
                "remove the cache's hooks) and run again."
            )


def copy_positions(
    donor: int, to: Sequence[int], source: Sequence[int], heads: Sequence[int] | None = None
) -> RowFn:
    """Copies the positions `source` of the row `donor` to the positions `to`, [pos, head?, ...]."""

    def copy(row: Tensor, rows: Tensor) -> Tensor:
        # Padding that a pipeline cut off, because it is no prompt's of the batch (Kandinsky 3), is not there.
        pairs = [(t, s) for t, s in zip(to, source, strict=True) if max(t, s) < len(row)]
        at, donated = [t for t, _ in pairs], rows[donor][[s for _, s in pairs]]
        if heads is None:
            row[at] = donated
            return row
        part = row[at]
        part[:, list(heads)] = donated[:, list(heads)]
        row[at] = part
        return row

    return copy


def copy_row(donor: int, heads: Sequence[int] | None = None) -> RowFn:
    """Copies the row `donor`, or some of its heads, [pos, head, ...]."""

    def copy(row: Tensor, rows: Tensor) -> Tensor:
        if heads is None:
            return rows[donor].clone()
        row[:, list(heads)] = rows[donor][:, list(heads)]
        return row

    return copy


# What is one for each prompt where a pipeline takes it: a picture, or what an encoder or a prior made of one.
_PICTURES = ("image", "image_embeds", "negative_image_embeds")


def picture_for_each(options: Mapping[str, Any], n_prompts: int) -> dict[str, Any]:
    """The options with a picture for each prompt: some pipelines do not repeat a single one themselves.

    Raises: InputError if they hold another number of pictures.
    """
    repeated = dict(options)
    for name in _PICTURES:
        pictures = options.get(name)
        if not isinstance(pictures, Tensor) or pictures.ndim not in (2, 4):
            continue
        if len(pictures) not in (1, n_prompts):
            raise InputError(
                f"{name} holds {len(pictures)} pictures for {n_prompts} prompts: give one picture for all."
            )
        repeated[name] = pictures.expand(n_prompts, *pictures.shape[1:])
    return repeated


def generate(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    row_edits: Iterable[RowEdit] = (),
    *,
    read: Sequence[Read] = (),
    options: Mapping[str, Any] | None = None,
) -> Float[Tensor, "row 3 height width"]:
    """The pictures of these prompts, 0..1, each from its seed's noise.

    Raises: MissingSiteError if the pipeline makes none; InputError if prompts and seeds differ in number, or
    options say what these arguments say.
    """
    check_pictures(model)
    options = dict(options or {})
    taken = sorted(set(options) & {"prompt", "seed", "num_images_per_prompt", "output_type"})
    if taken:
        raise InputError(f"The options hold {', '.join(taken)}, which cases and seeds say here.")
    inputs = {
        **picture_for_each(options, len(prompts)),
        "prompt": list(prompts),
        "seed": list(seeds),
        "output_type": "pt",
    }
    if len(prompts) != len(seeds):
        raise InputError(f"{len(prompts)} prompts and {len(seeds)} seeds: give a seed for each.")
    run = model.run(inputs, read=read, edit=edits(row_edits))
    check_each_step({r.site: r.fired for r in run.receipts})
    images = pictures_of(model, run.output)
    if not bool(torch.isfinite(images).all()):
        raise InputError("A picture holds NaN: a step broke down. Run it in float32 or bfloat16.")
    return images.float()
