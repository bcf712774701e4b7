"""How much of a pipeline's prompts its text encoders read: what is cut is refused, or said."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.inputs.texts import as_texts, token_counts
from mm_adapters.records.spec import ModelRecord
from mm_adapters.sites.prompt_encoders import PromptEncoder, prompt_encoders


def check_prompts(pipeline: Any, record: ModelRecord, arguments: Mapping[str, Any]) -> None:
    """Passes if each prompt is read whole by one text encoder at least.

    Warns of a prompt that other encoders cut (Flux and SD3 read by T5 what CLIP cuts), and of a negative
    prompt that is cut.

    Raises: InputError for what is no text, or a prompt that every encoder cuts.
    """
    encoders = prompt_encoders(pipeline, record)
    for argument, values in arguments.items():
        if values is not None and is_prompt(argument):
            as_texts(values, argument)
    for name in ("prompt", "negative_prompt"):
        _check_lengths(encoders, name, arguments)


def is_prompt(argument: str) -> bool:
    """Whether a pipeline's argument of this name is a text: prompt, prompt_2, negative_prompt, ..."""
    name = argument.rstrip("0123456789").removesuffix("_") if argument[-1:].isdigit() else argument
    return name in ("prompt", "negative_prompt")


def _check_lengths(encoders: list[PromptEncoder], name: str, arguments: Mapping[str, Any]) -> None:
    # By argument and number of the text: the encoders that read it whole, and those that cut it.
    whole: dict[tuple[str, int], list[str]] = {}
    cut: dict[tuple[str, int], list[tuple[int, int, str]]] = {}
    texts: dict[tuple[str, int], str] = {}
    for encoder in encoders:
        argument, given = encoder.text_of(arguments, name)
        if given is None:
            continue
        rows = as_texts(given, argument)
        limit = encoder.limit(arguments)
        for i, n in enumerate(token_counts(encoder.tokenizer, encoder.converted(rows, arguments))):
            texts[name, i] = rows[i]
            if limit is not None and n > limit:
                cut.setdefault((name, i), []).append((n, limit, encoder.part))
            else:
                whole.setdefault((name, i), []).append(encoder.part)
    for at, encoders_cutting in cut.items():
        text = texts[at]
        if name == "prompt" and at not in whole:
            length, most, _ = max(encoders_cutting, key=lambda one: one[1])
            raise InputError(
                f"{_named(at)} is {length} tokens long, with those for its start and end, and this "
                f"model reads at most {most}. Shorten it{_or_raise(arguments)}: {text[:60]!r}..."
            )
        parts = ", ".join(f"{part} reads {most} of its {n} tokens" for n, most, part in encoders_cutting)
        others = f"; {', '.join(whole[at])} reads it whole" if at in whole else ""
        warnings.warn(f"{_named(at)} is cut: {parts}{others}. It is {text[:60]!r}...", stacklevel=2)


def _named(at: tuple[str, int]) -> str:
    name, index = at
    return f"{'text' if name == 'prompt' else name}[{index}]"


def _or_raise(arguments: Mapping[str, Any]) -> str:
    return ", or raise max_sequence_length" if arguments.get("max_sequence_length") else ""
