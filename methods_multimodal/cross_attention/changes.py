"""Which pixels change when a word is blocked: the causal map beside the one of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.kept import kept
from methods_multimodal.core.record import Record
from methods_multimodal.cross_attention._recipes import index_of
from methods_multimodal.cross_attention._sites import prompt_layouts, text_attention
from methods_multimodal.cross_attention.cases import Case
from methods_multimodal.cross_attention.generation import generate_checked
from methods_multimodal.cross_attention.tracing import knockout_edits
from mm_adapters import InputError, Model


@dataclass(frozen=True)
class WordChanges(Record):
    """What blocking each word changes in one prompt's picture, drawn from the same noise.

    `changed` is, at each pixel, the root of the mean square over colours of the difference between the
    picture and the one with the word blocked: 0 is no change, 1 is black to white. `text` says whether the
    other words were kept from reading it, too.
    """

    changed: Float[Tensor, "word height width"]
    picture: Float[Tensor, "3 height width"]
    blocked: Float[Tensor, "word 3 height width"]
    words: tuple[str, ...]
    text: bool

    def of(self, word: str) -> Float[Tensor, "height width"]:
        """One word's map. Raises: WordNotFoundError listing the words there are."""
        return self.changed[index_of(word, self.words)]


def word_changes(
    model: Model,
    prompt: str,
    words: Sequence[str] | None = None,
    *,
    seed: int = 0,
    text: bool = True,
    batch: int = 16,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
) -> WordChanges:
    """Blocks the attention to each word in turn, at every layer and step, and says which pixels change.

    It costs a picture for each word. A word that changes nothing was not needed for this picture; pixels far
    from the thing it names can change, since everything that is drawn depends on everything else.

    Args:
        model: a pipeline that attends to words.
        prompt: what is drawn.
        words: words or phrases of the prompt; None for all of them.
        seed: of the noise.
        text: keep the other words from reading it too, in the text encoder. Without, those that follow still
            carry it, and only the pixels are kept from its own tokens.
        batch: rows of a run: the picture as it is, and one for each word.
        options: the pipeline's.
        folder: where runs are written down as they are done; a run that was killed goes on there.

    Source: Geva et al. 2023, arXiv 2304.14767, section 4, with pictures in place of answers.
    Raises: WordNotFoundError or InputError before anything runs; RuntimeError if attention is left.
    """
    if batch < 2:
        raise InputError(f"batch={batch}: a run holds the picture as it is and one with a word blocked.")
    text_attention(model)  # Says so if there is none.
    (layout,) = prompt_layouts(model, [prompt], options)
    shown = tuple(dict.fromkeys(w.text for w in layout.words[0]) if words is None else words)
    if not shown:
        raise InputError(f"The prompt {prompt!r} has no words to block.")
    for word in shown:  # Every mistake in a word comes up here.
        knockout_edits(model, Case(prompt, word), 0, text=text, options=options)
    chunks = [shown[i : i + batch - 1] for i in range(0, len(shown), batch - 1)]
    settings: dict[str, Any] = {"prompt": prompt, "words": list(shown), "seed": seed, "text": text}
    settings |= {"batch": batch, "options": dict(options or {})}

    def draw(number: int) -> dict[str, Tensor]:
        begin(f"run {number}")
        changes = [
            edit
            for row, word in enumerate(chunks[number], start=1)
            for edit in knockout_edits(model, Case(prompt, word), row, text=text, options=options)
        ]
        rows = [prompt] * (1 + len(chunks[number]))
        return {"": generate_checked(model, rows, seed, changes, options).cpu()}

    pictures: list[Tensor] = []
    bar = tqdm(total=len(chunks), desc="blocking words", unit="run", disable=None, leave=False)
    with (
        bar,
        kept(folder, job="word_changes", models={"model": model}, **settings) as work,
        work.calls(model) as begin,
    ):
        for number in range(len(chunks)):
            pictures.append(work.tensors(f"run {number}", partial(draw, number))[""])
            bar.update()
    base, blocked = pictures[0][0], torch.cat([rows[1:] for rows in pictures])
    apart = torch.cat([(rows[1:] - rows[0]).square().mean(1).sqrt() for rows in pictures])
    return WordChanges(changed=apart, picture=base, blocked=blocked, words=shown, text=text)
