"""Activations of one or several sites, collected from a model into stores, or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from integrations.sae_lens._data import inputs_of, items_of
from integrations.sae_lens._sites import SAESite, Tokens, find_site, layouts_of, reads_of, rows_of
from mm_adapters import InputError, Model
from mm_adapters.store import Column, Store, Writer, provenance

_WHERE = ("item", "position", "step")


def collect(
    model: Model,
    sites: str | Sequence[str],
    data: Any,
    folder: str | Path,
    *,
    tokens: Tokens = "all",
    steps: Iterable[int] | None = None,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    inputs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Store:
    """A store with one column a site, and where each row is from: item, position and step.

    `sites` are site names, or updates, "OUT - IN". `data` is a folder of images, or a list of
    images, prompts, or dicts of one row's inputs; `inputs` go to every run (a pipeline's
    `num_inference_steps`, ...). `tokens` are roles of the token layout ("class", "patch", "image",
    "word", "pad", ..., "all"); `steps` those of a sampling loop, of whose rows only the conditional
    ones are taken. Killed and called again, it goes on; the store ends up the same.

    Raises: MissingSiteError or InputError before any run; StoreError if the folder holds another store.
    """
    names = [sites] if isinstance(sites, str) else list(sites)
    steps = None if steps is None else sorted(set(steps))
    sae_sites = [find_site(model, name) for name in names]
    items = items_of(data)
    about = provenance(
        models={"model": model},
        data=items,
        sites=names,
        job="integrations.sae_lens.collect",
        tokens=[tokens] if isinstance(tokens, str) else list(tokens),
        steps=steps,
        rows="cond",
        inputs=dict(inputs or {}),
        batch_size=batch_size,
    )
    n_batches = -(-len(items) // batch_size)
    pending: dict[str, Tensor] | None = None
    if (Path(folder) / "manifest.json").is_file():
        widths = {n: c.shape for n, c in Store(folder, partial=True).columns.items() if n in names}
    else:
        pending = next(batches(model, sae_sites, items, tokens, steps, batch_size, inputs))
        widths = {name: tuple(pending[name].shape[1:]) for name in names}
    columns = {name: Column(widths.get(name, ()), dtype) for name in names}
    columns |= {name: Column((), torch.int32) for name in _WHERE}
    with ExitStack() as stack:
        writer = stack.enter_context(Writer(folder, columns, about))
        if not writer.complete:
            bar = tqdm(total=n_batches, initial=writer.appends, desc="activations", disable=not progress)
            stack.callback(bar.close)
            start = writer.appends
            if pending is not None and start == 0:
                writer.append(pending, items=min(batch_size, len(items)))
                bar.update()
                start = 1
            for rows in batches(model, sae_sites, items, tokens, steps, batch_size, inputs, start):
                writer.append(rows, items=batch_size)
                bar.update()
    return Store(folder)


def batches(
    model: Model,
    sae_sites: Sequence[SAESite],
    items: Sequence[Any],
    tokens: Tokens,
    steps: Sequence[int] | None,
    batch_size: int,
    inputs: Mapping[str, Any] | None,
    start: int = 0,
    order: Sequence[int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The rows of one batch of items after the other: a column for each site, and item, position, step."""
    numbers = list(range(len(items))) if order is None else list(order)
    reads = reads_of(model, sae_sites, steps)
    for at in range(start * batch_size, len(numbers), batch_size):
        part = numbers[at : at + batch_size]
        arguments = inputs_of(model, [items[i] for i in part], part, inputs or {})
        run = model.run(arguments, read=reads)
        unread = [r.site for r in reads if r.site not in run.values]
        if unread:
            raise InputError(
                f"{', '.join(unread)}: nothing was read there. This run does not come by, or not at "
                f"steps {steps}."
            )
        columns = rows_of(model, run, sae_sites, tokens, layouts_of(model, arguments, sae_sites))
        where = columns.pop("where")
        origins = {"item": torch.tensor(part, dtype=torch.int32)[where[:, 0].long()], "position": where[:, 1]}
        step = where[:, 2]
        if steps is not None:  # The loop counts what was read; the user counts the sampler's steps.
            step = torch.where(
                step < 0, step, torch.tensor(steps, dtype=torch.int32)[step.clamp_min(0).long()]
            )
        yield columns | origins | {"step": step}
