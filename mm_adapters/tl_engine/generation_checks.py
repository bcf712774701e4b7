"""What `generate` and a cached backward pass cannot do, said before the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import InputError


def check_mask(mask: Tensor | None, prompt: Tensor) -> None:
    """Raises: InputError if a mask is not [batch, pos] of the prompt."""
    if mask is not None and mask.shape != prompt.shape[:2]:
        raise InputError(
            f"attention_mask {list(mask.shape)} does not match the prompt shape {list(prompt.shape[:2])}. It "
            "is 1 where the prompt is no padding and 0 where it is; new tokens are added to it here."
        )


def check_padding_side(side: str | None, tokenizer: Any) -> None:
    """Raises: InputError if a side is given for tokens, and no tokenizer tells which of them are padding."""
    if side is not None and tokenizer is None:
        raise InputError(
            "padding_side says on which side of the tokens their padding is, and a tokenizer tells which "
            "token that is: this tower has none. Pass attention_mask=."
        )


def stop_texts(stop_strings: str | Sequence[str] | None, tokenizer: Any) -> list[str]:
    """The strings that end a row; none for None or an empty list.

    Raises: InputError without a tokenizer, which spells them.
    """
    strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if strings and tokenizer is None:
        raise InputError("stop_strings needs a tokenizer. Pass a criterion of token ids: stopping_criteria=.")
    return strings


def criteria_of(stopping_criteria: Any) -> list[Any]:
    """transformers' criteria, each with its answer checked.

    Raises: InputError for what is none.
    """
    if stopping_criteria is None:
        return []
    listed = list(stopping_criteria) if isinstance(stopping_criteria, Iterable) else [stopping_criteria]
    for criterion in listed:
        if not callable(criterion):
            raise InputError(
                "stopping_criteria takes a StoppingCriteria of transformers, or several, not "
                f"{type(criterion).__name__}."
            )
    return [_PerRow(criterion) for criterion in listed]


def check_fill(n_rows: int, ends_rows: bool, fill: int | None) -> None:
    """Raises: InputError if rows end on their own and there is no token to fill them up with."""
    if n_rows > 1 and ends_rows and fill is None:
        raise InputError(
            "Rows that end before others are filled up with a padding token, and there is none: give the "
            "tower a tokenizer, pass eos_token_id=, or continue one row at a time."
        )


def check_backward(return_type: Any, per_token: bool, stop_at_layer: int | None, tracked: bool) -> None:
    """Raises: InputError if `incl_bwd` has nothing to go back from. `tracked`: some weight has a gradient."""
    if not torch.is_grad_enabled():
        raise InputError(
            "incl_bwd=True needs gradients, and gradient tracking is off here: leave torch.no_grad() or "
            "set_grad_enabled(False)."
        )
    if stop_at_layer is not None:
        raise InputError("incl_bwd=True goes back from a loss, and stop_at_layer= gives a stream.")
    if return_type != "loss" or per_token:
        raise InputError(
            f"incl_bwd=True goes back from a scalar output, and return_type={return_type!r} gives none: "
            "pass return_type='loss', or run with hooks and call backward() on a number of your own."
        )
    if not tracked:
        raise InputError(_FROZEN)


_FROZEN = (
    "incl_bwd=True: the loss has no grad_fn, since every parameter is frozen. Call requires_grad_(True) "
    "on the tower first."
)


@contextmanager
def said_as_no_gradient() -> Iterator[None]:
    """Torch's words for a backward pass of what has no gradient become ours."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad and does not have a grad_fn" not in str(error):
            raise
        raise InputError(_FROZEN) from None


class _PerRow:
    """A criterion, whose answer is one truth value for each row."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        answer = self.criterion(input_ids, scores, **kwargs)
        if isinstance(answer, Tensor) and answer.shape not in ((), input_ids.shape[:1]):
            raise InputError(
                f"A stopping criterion gave {list(answer.shape)}; it gives a per-row bool, "
                f"{list(input_ids.shape[:1])}."
            )
        return answer
