"""The text arguments of a call, row by row: as nnsight's users write them, and padded to be one call.

Which arguments have an entry for each row, and what each is padded with, is nnsight 0.8.1's own table
(modeling/processing.py, ROW_FIELDS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from nnsight.modeling import processing
from torch import Tensor
from torch._guards import detect_fake_mode

from mm_adapters._errors import InputError
from mm_adapters.inputs.padding import POSITIONS, is_padded_left, row_positions

_MASK, _KINDS, _LABELS = "attention_mask", "token_type_ids", "labels"


@dataclass(frozen=True)
class Padding:
    """How texts of several lengths are made one batch.

    `token` pads token ids, and without one they cannot be padded; `left` is its side. `targets` have a
    length of their own, and are padded at the right. `told`: padding at the left counts as positions, so
    a call is told those of its tokens.
    """

    token: int | None = 0
    left: bool = False
    targets: frozenset[str] = processing.TARGET_FIELDS
    told: bool = False


def as_rows(arguments: Mapping[str, Any], padding: Padding) -> dict[str, Any]:
    """Arguments with tokens, embeddings and what stands beside them as tensors, one row for each text.

    Each may come as numbers, lists, arrays or tensors, of one row or of several.

    Raises: InputError if they are of different numbers of rows or tokens.
    """
    out = dict(arguments)
    source = processing.input_key(out)
    fields = {k: v for k, v in out.items() if _is_field(k, v)}
    if source is None or _are_batched(source, fields):
        return out
    if _others(out) and all(isinstance(v, Tensor) and v.ndim > 1 for v in fields.values()):
        return out
    try:
        rows, rest = processing.encode_pretokenized(out)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{str(error).rstrip('.')}. Pass one entry for each token of each row.") from None
    if _MASK not in fields:  # nnsight adds one of ones, which changes nothing but where rows are padded.
        rows = [{k: v for k, v in row.items() if k != _MASK} for row in rows]
    rows = level(rows, padding)
    return rest | {k: torch.cat([row[k] for row in rows]) for k in rows[0]}


def level(calls: list[dict[str, Any]], padding: Padding) -> list[dict[str, Any]]:
    """Calls whose text arguments are as long in one as in another, so that they can be joined.

    What one call leaves out and another has is what it stands for: a mask of ones, kinds of zero, positions
    counted from the first token, labels that no loss counts.

    Raises: InputError for what nothing stands for; if rows are to be padded and there is no padding token.
    """
    texts = [call for call in calls if processing.input_key(call)]
    lengths = {_ids(call).shape[1] for call in texts if _ids(call).ndim > 1}
    keys = dict.fromkeys(k for call in texts for k, v in call.items() if _is_padded(k, v))
    if len(lengths) > 1:
        keys[_MASK] = None
    whole = [call | _left_out(call, texts, list(keys), padding) for call in texts]
    widths = {
        k: max(call[k].shape[1] for call in whole if call[k].ndim > 1) for k in keys if _has_width(whole, k)
    }
    padded = iter([call | {k: _padded(call[k], k, n, padding) for k, n in widths.items()} for call in whole])
    return [next(padded) if processing.input_key(call) else call for call in calls]


def with_positions(call: dict[str, Any], padding: Padding) -> dict[str, Any]:
    """A call that is told its tokens' positions, if it is padded at the left and would count the padding."""
    mask, source = call.get(_MASK), processing.input_key(call)
    if not padding.told or not isinstance(mask, Tensor) or source is None or call.get(POSITIONS) is not None:
        return call
    if detect_fake_mode() is not None:  # Of a scan: no shape follows from them.
        return call
    # A mask that is longer than its tokens is that of a cache too, whose length the model adds by itself.
    if mask.ndim != 2 or mask.shape != call[source].shape[:2] or _others(call) or not is_padded_left(mask):
        return call
    return call | {POSITIONS: row_positions(mask)}


def _is_field(key: str, value: Any) -> bool:
    return (key in processing.ROW_FIELDS or key.endswith(_KINDS)) and value is not None


def _is_padded(key: str, value: Any) -> bool:
    # Positions of three axes, or a mask of four, are not a number for each token.
    most = 3 if key.endswith("embeds") else 2
    return _is_field(key, value) and isinstance(value, Tensor) and 0 < value.ndim <= most


def _others(call: Mapping[str, Any]) -> list[str]:
    """The tensors that are no text's: pictures, and what comes with them."""
    return [k for k, v in call.items() if isinstance(v, Tensor) and not _is_field(k, v)]


def _ids(call: Mapping[str, Any]) -> Tensor:
    return call[processing.input_key(call)]  # type: ignore[index]


def _are_batched(source: str, fields: dict[str, Any]) -> bool:
    ids = fields[source]
    if not all(isinstance(v, Tensor) for v in fields.values()) or ids.ndim != (
        3 if source != "input_ids" else 2
    ):
        return False
    beside = [v.shape[:2] == ids.shape[:2] for k, v in fields.items() if k in processing.SHARED_FIELDS]
    return all(beside) and all(v.ndim and v.shape[0] == ids.shape[0] for v in fields.values())


def _left_out(
    call: dict[str, Any], calls: list[dict[str, Any]], keys: list[str], padding: Padding
) -> dict[str, Any]:
    lacking = [k for k in keys if not isinstance(call.get(k), Tensor)]
    if not lacking:
        return {}
    ids = call.get("input_ids", call.get("inputs_embeds"))
    assert ids is not None
    size = ids.shape[:2]
    mask = (
        call[_MASK]
        if isinstance(call.get(_MASK), Tensor)
        else torch.ones(size, dtype=torch.long, device=ids.device)
    )
    values: dict[str, Any] = {}
    for key in lacking:
        theirs = next((c[key] for c in calls if isinstance(c.get(key), Tensor)), mask)
        if key == _MASK:
            values[key] = mask
        elif key.endswith(_KINDS):
            values[key] = torch.zeros(size, dtype=torch.long, device=ids.device)
        elif key == POSITIONS:
            values[key] = row_positions(mask)
        elif key == _LABELS and not theirs.is_floating_point():
            each = (size[1] if key not in padding.targets else 1,) if theirs.ndim > 1 else ()
            values[key] = theirs.new_full((size[0], *each), -100)
        else:
            counts = [(_ids(c).shape[0], isinstance(c.get(key), Tensor)) for c in calls]
            raise InputError(
                f"{sum(n for n, has in counts if has)} of {sum(n for n, _ in counts)} rows have `{key}`, and "
                "nothing stands for it in the others. Give it in each invoke, or in none."
            )
    return values


def _has_width(calls: list[dict[str, Any]], key: str) -> bool:
    ranks = {call[key].ndim for call in calls}
    if len(ranks) > 1:
        shapes = ", ".join(str(list(call[key].shape)) for call in calls)
        raise InputError(
            f"{key} has the shapes {shapes} in the invokes of one run. Give it the same way in each."
        )
    return min(ranks) > 1


def _padded(value: Tensor, key: str, width: int, padding: Padding) -> Tensor:
    short = width - value.shape[1]
    if not short:
        return value
    fill = processing.ROW_FIELDS.get(key, 0)
    if fill is None:
        fill = padding.token
    if fill is None:
        raise InputError(
            f"Rows of `{key}` differ in length, and cannot be padded without a pad token. Set one: "
            "model.tokenizer.pad_token = model.tokenizer.eos_token."
        )
    sides = (short, 0) if padding.left and key not in padding.targets else (0, short)
    return F.pad(value, (*(0, 0) * (value.ndim - 2), *sides), value=fill)
