"""The arguments of a run's invokes as one call, and the row axis of each location of a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mm_adapters._errors import InputError
from mm_adapters.nnsight_engine.batcher import MIXED, Axis
from mm_adapters.nnsight_engine.pipe_inputs import common, n_texts
from mm_adapters.nnsight_engine.points import ROOT
from mm_adapters.nnsight_engine.text_rows import Padding, level
from mm_adapters.records.spec import Guidance
from mm_adapters.runs.session import is_guided
from mm_adapters.sites.site_map import SiteMap
from mm_adapters.sites.tower_view import TowerView

_PICTURE_KEYS = ("pixel_", "image")
_TEXTS, _IMAGES, _ROWS = "texts", "images", "rows"
_PROMPTS, _PICTURES = "prompts", "pictures"
_PER_PROMPT = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class Rows:
    """The row axes of one model: images and texts, prompts and pictures, or just rows."""

    def __init__(self, wrapped: Any, sites: SiteMap, paths: Mapping[int, str], attention: Mapping[str, int]):
        self._wrapped = wrapped  # A PipelineModule for a pipeline, which it may replace.
        self._sites = sites
        self._kind = sites.model_record.kind
        self._root = paths[-1]
        self._attention = sorted(attention.items(), key=lambda item: -len(item[0]))
        homes = {paths[id(t.module)]: self._of_tower(t) for t in sites.towers.values()}
        homes |= self._of_projections()
        self._homes = sorted(homes.items(), key=lambda item: -len(item[0]))
        self._known: dict[str, Axis] = {}
        self._arguments: dict[str, Any] = {}

    def axis(self, location: str) -> Axis:
        """The axis of what is at a location."""
        if location not in self._known:
            self._known[location] = self._find(location)
        return self._known[location]

    def is_output(self, location: str) -> bool:
        """Whether the whole model's output is at a location."""
        return location in ("result", f"{self._root}.output")

    def entry(self, key: str) -> tuple[str, ...] | None:
        """The axes of an entry of the model's output; None if its name does not tell."""
        if self._kind == "contrastive":
            names = [(key.find(w), a) for w, a in (("image", _IMAGES), ("vision", _IMAGES), ("text", _TEXTS))]
            axes = [axis for at, axis in sorted(names) if at >= 0]
            if not axes:
                return None
            other = _TEXTS if axes[0] == _IMAGES else _IMAGES
            return (axes[0], other) if key.startswith("logits") else (axes[0],)
        if self._kind == "vlm":
            return (_IMAGES,) if key.startswith(_PICTURE_KEYS) else (_TEXTS,)
        if self._kind == "diffusion":
            return (_PICTURES,)
        return None

    def count(self, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, int]:
        """How many rows of each axis one invoke gives."""
        if self._kind == "diffusion":
            n = n_prompts(arguments)
            self._arguments = {**options, **arguments}
            each = self._arguments.get("num_images_per_prompt") or 1
            return {_PROMPTS: n, _PICTURES: n * each}
        if "pipe" in arguments:
            return {_TEXTS if self._kind == "vlm" else _ROWS: n_texts(arguments["pipe"])}
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim}
        if self._kind == "tower":
            (tower,) = self._sites.towers.values()
            takes = tower.mount.takes or tower.record.takes
            first = tensors.get(takes, next(iter(tensors.values()), None))
            return {_ROWS: 0 if first is None else first.shape[0]}
        images = [v.shape[0] for k, v in tensors.items() if k.startswith(_PICTURE_KEYS)]
        texts = [v.shape[0] for k, v in tensors.items() if not k.startswith(_PICTURE_KEYS)]
        return {_IMAGES: max(images, default=0), _TEXTS: max(texts, default=0)}

    def _of_tower(self, tower: TowerView) -> Axis:
        if self._kind == "tower":
            return Axis(_ROWS)
        if self._kind == "diffusion":
            if tower.name in self._sites.loops:
                return Axis(_PICTURES, partial(self._parts, self._sites.loops[tower.name]))
            return Axis(_PROMPTS if tower.record.role.startswith("text") else _PICTURES)
        if self._kind == "vlm":
            return Axis(_TEXTS if tower.record.role == "language" else _IMAGES)
        return Axis(_TEXTS if tower.record.role == "text" else _IMAGES)

    def _of_projections(self) -> dict[str, Axis]:
        if self._kind != "contrastive":
            return {}
        axes = {}
        for name, tower in self._sites.towers.items():
            path = (tower.mount.project or "").rpartition(" @ ")[2].removesuffix(".T").rpartition(".")[0]
            if path and not path.startswith(tower.path or "?"):
                axes[f"{self._root}.{path}"] = self._of_tower(self._sites.towers[name])
        return axes

    def _find(self, location: str) -> Axis:
        if location.startswith(f"{ROOT}."):
            site = self._sites[location.removeprefix(f"{ROOT}.").removesuffix(".output")]
            return self._of_tower(self._sites.towers[site.tower])
        path = location.rpartition(".")[0]
        if path in ("", self._root):
            return {"vlm": Axis(_TEXTS), "tower": Axis(_ROWS), "diffusion": Axis(_PICTURES)}.get(
                self._kind, Axis(MIXED)
            )
        n_heads = next((n for p, n in self._attention if path.startswith(p)), 1)
        for home, axis in self._homes:
            if path == home or path.startswith(f"{home}."):
                return Axis(axis.name, axis.parts, n_heads)
        return {"vlm": Axis(_TEXTS), "diffusion": Axis(_PICTURES), "tower": Axis(_ROWS)}.get(
            self._kind, Axis(MIXED)
        )

    def _parts(self, guidance: Guidance | None) -> int:
        if (
            guidance is None
            or guidance.denoiser_calls
            or not is_guided(self._wrapped.pipeline, guidance, self._arguments)
        ):
            return 1
        return len(guidance.denoiser_rows)


# The arguments that tell how many pictures are made, where no prompt does.
_ROWS_OF = ("prompt_embeds", "class_labels", "image_embeds", "image", "batch_size")


def n_prompts(arguments: Mapping[str, Any], by_text: bool = False) -> int:
    """The rows that a pipeline's arguments ask for; `by_text`, only its prompt says so."""
    prompt = arguments.get("prompt")
    if prompt is not None:
        return 1 if isinstance(prompt, str) else len(prompt)
    for name in _ROWS_OF[:1] if by_text else _ROWS_OF:
        rows = arguments.get(name)
        if rows is not None:
            return rows if isinstance(rows, int) else len(rows) if isinstance(rows, list | Tensor) else 1
    return 0


def combine(invokes: list[dict[str, Any]], padding: Padding) -> dict[str, Any]:
    """One model call for all invokes: tensors one after another, texts padded to the longest.

    Raises: InputError if two invokes give different values for what the call takes once, or their texts
    cannot be padded.
    """
    invokes = level(invokes, padding)
    out: dict[str, Any] = {}
    for key in dict.fromkeys(k for a in invokes for k in a):
        values = [a[key] for a in invokes if a.get(key) is not None]
        if all(isinstance(v, Tensor) and v.ndim for v in values):
            widths = {tuple(v.shape[1:]) for v in values}
            if len(widths) > 1:
                raise InputError(f"{key} has the sizes {sorted(widths)} in the invokes of one run.")
            out[key] = torch.cat(values)
        elif values:
            out[key] = common(key, values)
    return out


def combine_prompts(invokes: list[dict[str, Any]]) -> dict[str, Any]:
    """One pipeline call for all invokes: prompts and embeddings one after another, a seed for each.

    Raises: InputError if two invokes give different values for an option of the whole call.
    """
    counts = [n_prompts(a) for a in invokes]
    out: dict[str, Any] = {}
    for key in dict.fromkeys(k for a in invokes for k in a):
        values = [a.get(key) for a in invokes]
        if key in _PER_PROMPT:
            if key.startswith("prompt") and None in values:
                raise InputError(f"Some invokes give {key} and some do not. Give all of them one.")
            rows = [_spread(v, n) for v, n in zip(values, counts, strict=True)]
            out[key] = [text for row in rows for text in row]
        elif key in _EMBEDS and all(isinstance(v, Tensor) for v in values):
            out[key] = torch.cat([v for v in values if v is not None])
        elif key == "seed":
            if None in values:
                raise InputError("Some invokes give a seed and some do not. Give all of them one.")
            out[key] = [s for v, n in zip(values, counts, strict=True) for s in _seeds(v, n)]
        else:
            out[key] = common(key, values)
    return out


def _spread(value: Any, n: int) -> list[str]:
    if value is None:
        return [""] * n
    return [value] * n if isinstance(value, str) else list(value)


def _seeds(value: Any, n: int) -> list[int]:
    if isinstance(value, list | tuple):
        return list(value)
    if n > 1:
        raise InputError(f"An invoke of {n} prompts takes {n} seeds: seed=[...].")
    return [value]
