"""SAELens' cached activations: a store written as one, and one read as a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mm_adapters import InputError
from mm_adapters.store import Column, Store, Writer


def export_cached(store: Store, site: str, folder: str | Path, *, context_size: int) -> Path:
    """Writes one column as SAELens' `ActivationsStore(cached_activations_path=...)` reads it.

    A Hugging Face data set with a column Array2D [context_size, d_in] a row: `context_size` is the
    number of chosen positions an item has (65 for class and 64 patches).

    Raises: InputError if the rows do not come in such groups, or are bfloat16, which the format lacks.
    """
    from datasets import Array2D, Dataset, Features

    if site not in store.columns:
        raise InputError(f"{store.folder} has no column {site!r}; it has {list(store.columns)}.")
    column = store.columns[site]
    kinds = {torch.float32: "float32", torch.float16: "float16"}
    if column.dtype not in kinds:
        raise InputError(f"SAELens' format has no {column.dtype}; collect as float32 or float16.")
    if len(store) % context_size:
        raise InputError(
            f"{len(store)} rows are no multiple of context_size={context_size}: this format wants the same "
            "number of positions for every item."
        )
    shape = (context_size, *column.shape)
    features = Features({site: Array2D(shape=shape, dtype=kinds[column.dtype])})

    def rows() -> Any:
        for batch in store.batches(context_size, seed=None, columns=[site]):
            yield {site: batch[site].numpy()}

    Dataset.from_generator(rows, features=features, cache_dir=str(Path(folder) / "cache")).save_to_disk(
        str(Path(folder) / "data")
    )
    return Path(folder) / "data"


def import_cached(data: str | Path, folder: str | Path) -> Store:
    """A store of what SAELens' CacheActivationsRunner wrote: each [context, d_in] becomes rows."""
    from datasets import load_from_disk

    cached: Any = load_from_disk(str(data)).with_format("torch")
    names = [n for n in cached.column_names if n != "token_ids"]
    if not names or not len(cached):
        raise InputError(f"{data} has no activations.")
    first = cached[0]
    columns = {n: Column((first[n].shape[-1],), first[n].dtype) for n in names}
    with Writer(folder, columns, {"made_by": "integrations.sae_lens.import_cached"}) as writer:
        for at in range(writer.items, len(cached), 64):
            batch = cached[at : at + 64]
            writer.append({n: batch[n].flatten(0, 1) for n in names}, items=len(batch[names[0]]))
    return Store(folder)
