"""What a model says when it is asked in words: its answer among given ones, beside what a probe reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from methods_multimodal.core.embed import embed, unit
from methods_multimodal.core.kept import kept
from methods_multimodal.core.model import check_sites
from methods_multimodal.core.outputs import vocabulary_logits
from methods_multimodal.core.record import Record
from methods_multimodal.probing.labels import Column
from mm_adapters import InputError, MissingSiteError, Model


@dataclass(frozen=True)
class PromptProbe(Record):
    """How much each picture speaks for each value: the mean cosine of its texts, or its log probability.

    `truth` are the pictures' values, as numbers of `values`.
    """

    scores: Float[Tensor, "image value"]
    truth: Int[Tensor, " image"]
    values: tuple[str, ...]
    unit: str

    @property
    def right(self) -> Bool[Tensor, " image"]:
        """Whether the value that scores most is the picture's."""
        return self.scores.argmax(1) == self.truth

    @property
    def accuracy(self) -> float:
        """The share of pictures that are right."""
        return float(self.right.double().mean())

    @property
    def shuffled_accuracy(self) -> float:
        """What the same answers reach on average if the pictures' values are dealt out anew: chance."""
        said = self.scores.argmax(1).bincount(minlength=len(self.values)).double() / len(self.truth)
        return float(said @ self.truth.bincount(minlength=len(self.values)).double() / len(self.truth))

    @property
    def calibrated(self) -> PromptProbe:
        """Each value's scores less their mean over the pictures: what is said of every picture has no part.

        The mean uses no label. Source: Zhao et al. 2021, arXiv 2102.09690, with these pictures as reference.
        """
        return PromptProbe(
            self.scores - self.scores.mean(0), self.truth, self.values, f"{self.unit}, centred"
        )

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the accuracy, over pictures."""
        ends = scipy.stats.binomtest(int(self.right.sum()), len(self.right)).proportion_ci(level, "wilson")
        return float(ends.low), float(ends.high)

    @property
    def confusion(self) -> Float[Tensor, "truth answer"]:
        """Of the pictures with each value, the share that each answer is given to."""
        counts = torch.zeros(len(self.values), len(self.values), dtype=torch.float64)
        counts.index_put_(
            (self.truth, self.scores.argmax(1)), torch.ones(1, dtype=torch.float64), accumulate=True
        )
        return counts / counts.sum(1, keepdim=True).clamp_min(1)


def prompt_probe(
    model: Model,
    images: Sequence[Any],
    labels: Column,
    prompts: str | Sequence[str],
    *,
    values: Sequence[str] | None = None,
    batch: int = 32,
    folder: str | Path | None = None,
) -> PromptProbe:
    """Asks a model in words which value a picture has.

    Of a contrastive model `prompts` are templates like "a photo of a {}", and a value's score is the mean
    cosine of the picture with them. Of a VLM a prompt is a question ("<image>\\nwhat colour is it? answer:"),
    one for all pictures or one each, and a value's score is its log probability as the answer, all its tokens
    together.

    Args:
        model: A contrastive model or a VLM.
        images: One picture a row.
        labels: Each picture's value.
        prompts: Templates, or questions.
        values: The values to choose from (None: those that the labels have).
        batch: How many pictures of a run.
        folder: Where scores are written down as they are made, so that a call that was killed goes on.

    Source: Petroni et al. 2019, arXiv 1909.01066; Radford et al. 2021, arXiv 2103.00020, section 3.1.2.
    Raises: MissingSiteError for a model that is neither; InputError for a template without "{}", labels that
        are no values, or an answer whose first letters the tokenizer joins with the prompt.
    """
    names = tuple(sorted({str(label) for label in labels}) if values is None else map(str, values))
    unknown = sorted({str(label) for label in labels} - set(names))
    if len(labels) != len(images) or unknown or len(names) < 2:
        raise InputError(
            f"{len(labels)} labels for {len(images)} images, of the values {', '.join(names)}"
            + (f"; {unknown[0]!r} is none of them." if unknown else ". There are at least two values.")
        )
    contrastive = model.kind == "contrastive"
    if not contrastive:
        _check_answering(model)
    model.check_tower("vision")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if contrastive and not all("{}" in text for text in texts):
        raise InputError('Of a contrastive model prompts are templates: "{}" stands where the value goes.')
    if not contrastive and len(texts) not in (1, len(images)):
        raise InputError(f"There are {len(texts)} questions for {len(images)} images. Give one, or one each.")
    if not contrastive:
        texts = texts * (len(images) // len(texts))
        for name in names:
            _answer_ids(model, texts[0], name)
    made_of: dict[str, Any] = {"models": {"model": model}, "data": [*images, *texts], "values": names}
    parts = []
    with kept(folder, job="prompt_probe", batch=batch, **made_of) as work:
        directions = None
        for start in tqdm(range(0, len(images), batch), desc="asking", disable=None, leave=False):
            shown, asked = list(images[start : start + batch]), texts[start : start + batch]
            if contrastive and directions is None:
                directions = work.tensors("texts", lambda: {"texts": _directions(model, texts, names)})[
                    "texts"
                ]

            def scores(
                shown: Any = shown, asked: Any = asked, directions: Any = directions
            ) -> dict[str, Tensor]:
                if contrastive:
                    cosines = unit(embed(model, shown, "vision")).cpu() @ directions.flatten(0, 1).T
                    return {"scores": cosines.unflatten(1, directions.shape[:2]).mean(2)}
                return {"scores": _log_p(model, shown, asked, names)}

            parts.append(work.tensors(f"images{start}", scores)["scores"])
    return PromptProbe(
        scores=torch.cat(parts),
        truth=torch.tensor([names.index(str(label)) for label in labels]),
        values=names,
        unit="cosine" if contrastive else "log probability, nats",
    )


def _directions(
    model: Model, templates: Sequence[str], names: Sequence[str]
) -> Float[Tensor, "value text d"]:
    flat = [template.format(name) for name in names for template in templates]
    return unit(embed(model, flat, "text")).cpu().unflatten(0, (len(names), len(templates)))


def _check_answering(model: Model) -> None:
    """Raises: MissingSiteError unless one stream reads the prompt and goes on with the answer."""
    if "language" not in model.towers:
        raise MissingSiteError(f"{model.name}: no tower 'language' answers, and it does not compare texts.")
    tower = model.check_tower("language")
    _ = tower.unembedding
    check_sites(model, ["language.blocks.0.hook_resid_pre"])
    if tower.input_name != "input_ids":
        raise MissingSiteError(
            "The language tower's layout has no 'image' role: it reads answers alone "
            f"({tower.input_name}), and another tower the prompt."
        )


def _answer_ids(model: Model, prompt: str, name: str) -> list[int]:
    """The tokens that a value adds to a prompt. Raises: InputError if the prompt's own become others."""
    tokenizer = model.tokenizer_of("language")
    if tokenizer is None:
        raise InputError(
            f"{model.name} has no tokenizer, so answers in words have no tokens. Load it with one."
        )
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt} {name}")
    )
    if after[: len(before)] != before or len(after) <= len(before):
        raise InputError(
            f"With the answer {name!r} the tokens of {prompt!r} are others. End the prompt at a word's end, "
            "without a space."
        )
    return after[len(before) :]


def _log_p(
    model: Model, images: list[Any], prompts: list[str], names: Sequence[str]
) -> Float[Tensor, "row value"]:
    """How likely each whole answer is after each prompt, in nats."""
    asked = model.prepare(images=images, text=prompts)
    if len(asked["input_ids"]) != len(prompts):
        raise InputError(
            f"There are {len(asked['input_ids'])} rows for {len(prompts)} prompts: give one image per row."
        )
    mask = asked.get("attention_mask")
    if len(prompts) > 1 and mask is not None and not bool(mask[:, -1].all()):
        # An answer would stand after the padding.
        return torch.cat([_log_p(model, [i], [p], names) for i, p in zip(images, prompts, strict=True)])
    columns = []
    for name in names:
        answers = [_answer_ids(model, prompt, name) for prompt in prompts]
        # A row whose answer is shorter goes on with its first token, which comes after what is scored.
        longest = max(map(len, answers))
        full = [answer + answer[:1] * (longest - len(answer)) for answer in answers]
        inputs = _extended(asked, torch.tensor(full))
        logits = vocabulary_logits(model, model.run(inputs).output).detach().float()
        log_p = logits[:, -longest - 1 : -1].log_softmax(2).cpu()
        scored = log_p.gather(2, torch.tensor(full)[..., None])[..., 0]
        columns.append(
            torch.stack([row[: len(answer)].sum() for row, answer in zip(scored, answers, strict=True)])
        )
    return torch.stack(columns, 1)


def _extended(asked: Mapping[str, Any], answers: Int[Tensor, "row new"]) -> dict[str, Any]:
    """The arguments of prompts that end with answers; all else of a position is as at the prompt's last."""
    ids = asked["input_ids"]
    out = dict(asked)
    for key, value in asked.items():
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[:2] == ids.shape:
            more = value[:, -1:].expand(-1, answers.shape[1], *value.shape[2:])
            out[key] = torch.cat([value, answers.to(ids) if key == "input_ids" else more], 1)
    return out
