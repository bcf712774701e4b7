"""The texts of a batch: that they are texts, how long they are, where their images stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.inputs.images import as_list


def as_texts(text: Any, name: str = "text") -> list[str]:
    """A list of the texts; one string is one text. "" is a text. `name` is the argument's.

    Raises: InputError if there is none, or one that is not a string of whole characters.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise InputError(f"{name} is {type(text).__name__}. Pass a string or a list of strings.")
    if not texts:
        raise InputError(f'{name} is empty. Pass at least one string; "" is one.')
    for i, item in enumerate(texts):
        if not isinstance(item, str):
            raise InputError(f"{name}[{i}] is {type(item).__name__} ({item!r}), not a string.")
        if any("\ud800" <= letter <= "\udfff" for letter in item):
            raise InputError(f"{name}[{i}] is {item!r}, with half a character, which no tokenizer reads.")
    return list(texts)


def token_counts(tokenizer: Any, texts: list[str]) -> list[int]:
    """How many tokens each text has, with those for its start and end, before any truncation."""
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return [len(ids) for ids in tokenizer(texts, truncation=False, padding=False)["input_ids"]]
    inner = getattr(tokenizer, "tokenizer", None)  # open_clip's HFTokenizer holds one.
    if inner is not None:
        return token_counts(inner, [tokenizer.clean_fn(t) for t in texts])
    return [len(tokenizer.encode(t)) + 2 for t in texts]


def check_lengths(texts: list[str], lengths: list[int], context: int | None) -> None:
    """Raises: InputError naming the first text that is longer than the context."""
    for i, length in enumerate(lengths):
        if context is not None and length > context:
            raise InputError(
                f"text[{i}] is {length} tokens long, with those for its start and end, and this "
                f"model reads at most {context}. Shorten it: {texts[i][:60]!r}..."
            )


def interleave(
    texts: list[str], images: Any, token: str, prompt: str | None = None
) -> tuple[list[str], list[list[Any]]]:
    """Each row's text with one image token for each of its images, and each row's images.

    A text without any gets them in front, each on a line of its own, as `prompt` writes them.

    Raises: InputError if images and rows, or images and tokens of a row, differ in number.
    """
    rows = image_rows(images, len(texts))
    pairs = enumerate(zip(texts, rows, strict=True))
    return [_with_tokens(i, text, len(row), token, prompt or token) for i, (text, row) in pairs], rows


def image_rows(images: Any, n_rows: int) -> list[list[Any]]:
    """The images of each row of text.

    Raises: InputError if there are none, or they and the rows differ in number.
    """
    rows = as_list(images)
    if not rows:
        raise InputError("images is empty. Pass at least one image, or leave images out.")
    nested = [isinstance(row, list | tuple) for row in rows]
    if any(nested) and not all(nested):
        raise InputError("images mixes images and lists of images. Pass one list for each row of text.")
    if len(rows) != n_rows:
        kind = "lists of images" if any(nested) else "images"
        raise InputError(
            f"There are {len(rows)} {kind} for {n_rows} rows of text. Pass one image for each row, or a "
            "list for each: images=[[first, second]]."
        )
    return [list(row) if many else [row] for row, many in zip(rows, nested, strict=True)]


def _with_tokens(index: int, text: str, n_images: int, token: str, prompt: str) -> str:
    count = text.count(token)
    if count == 0:
        return f"{prompt}\n" * n_images + text
    if count != n_images:
        raise InputError(
            f"text[{index}] has {count} {token} and {n_images} images. Write one for each image, or none: "
            "they are put in front then."
        )
    return text
