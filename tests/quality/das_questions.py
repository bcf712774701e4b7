"""Questions put to a model once: what it keeps of a prompt but for its last token, and its answers.

An interchange at the last token changes nothing before it, so a counterfactual run reads from there on: the
last token and the answer, over the keys and values of what was read before. An answer counts as a whole:
each of its tokens, and its end, has to be the likeliest after those before it, as in greedy generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

import mm_adapters as mm
from mm_adapters.zoo import world

IGNORED = -100


@dataclass(frozen=True)
class Question:
    """A question about one object of a scene; `variable` is the value that an interchange moves."""

    scene: int
    thing: int
    kind: str
    text: str
    answer: str
    variable: str


@dataclass(frozen=True)
class Asked:
    """Questions as a model read them.

    Attributes:
        questions: As many as there are rows.
        prompts: The model's own arguments for the whole prompts, padded at the left.
        kept: Of each layer, keys and values of all tokens but the last, [question, head, token, width].
        tokenizer: Spells answers.
    """

    questions: list[Question]
    prompts: dict[str, Tensor]
    kept: list[tuple[Tensor, Tensor]]
    tokenizer: Any

    def continued(self, rows: Tensor, answers: Sequence[str] | None = None) -> dict[str, Any]:
        """The last tokens of these prompts, and the answers after them: a model's own arguments.

        The first position is the prompt's last token. Answers of fewer tokens are padded at the right.
        """
        ids = self.prompts["input_ids"][rows, -1:]
        if answers is not None:
            spelled = self._spelled(answers)
            width = max(map(len, spelled)) - 1
            pad = self.tokenizer.pad_token_id
            ids = torch.cat([ids, torch.tensor([(s[:-1] + [pad] * width)[:width] for s in spelled])], 1)
        mask = self.prompts["attention_mask"][rows]
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - 1, dtype=mask.dtype)], 1)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": _Read(self.kept, rows)}

    def targets(self, answers: Sequence[str]) -> Tensor:
        """The token that each position of `continued` has to say, [row, position]; IGNORED past the end."""
        spelled = self._spelled(answers)
        width = max(map(len, spelled))
        return torch.tensor([s + [IGNORED] * (width - len(s)) for s in spelled])

    def _spelled(self, answers: Sequence[str]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        return [[*self.tokenizer(f" {a}", add_special_tokens=False).input_ids, end] for a in answers]


class _Read(DynamicCache):
    """Keys and values of tokens that were read. What a run adds is not kept: the next finds the same."""

    def __init__(self, kept: list[tuple[Tensor, Tensor]], rows: Tensor) -> None:
        super().__init__()
        for layer, (keys, values) in enumerate(kept):
            super().update(keys[rows], values[rows], layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], 2), torch.cat([layer.values, value_states], 2)


@torch.no_grad()
def put(model: mm.HookedModel, scenes: Sequence[world.Scene], questions: list[Question]) -> Asked:
    """Puts questions about scenes to a model."""
    pictures = [Image.fromarray(p) for p in world.render_batch(scenes)]
    ready = model.inputs.prepare(
        text=[f"<image>\nquestion: {q.text} answer:" for q in questions],
        images=[[pictures[q.scene]] for q in questions],
        padding_side="left",
    )
    ready = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in ready.items()}
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for at in range(0, len(questions), 64):
        rows = {k: v[at : at + 64] for k, v in ready.items()}
        cache = model.wrapped(**rows, use_cache=True).past_key_values
        parts.append([(layer.keys[:, :, :-1], layer.values[:, :, :-1]) for layer in cache.layers])
    kept = [
        (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
        for layer in zip(*parts, strict=True)
    ]
    return Asked(questions, ready, kept, model.inputs.tokenizer)


def says(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each row says its whole answer, greedily, [row]; logits are [row, position, token]."""
    hits = (logits.argmax(-1) == targets) | (targets == IGNORED)
    return hits.all(1)


@torch.no_grad()
def known(model: mm.HookedModel, asked: Asked) -> Tensor:
    """Whether the model answers each question rightly, [question]."""
    found = []
    for rows in torch.arange(len(asked.questions)).split(128):
        answers = [asked.questions[int(i)].answer for i in rows]
        found.append(says(model.wrapped(**asked.continued(rows, answers)).logits, asked.targets(answers)))
    return torch.cat(found)
