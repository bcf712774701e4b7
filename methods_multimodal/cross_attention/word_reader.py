"""What to read in a run for its word maps, so that one run can serve several methods."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import latent_grid
from methods_multimodal.cross_attention._rows import check_each_step
from methods_multimodal.cross_attention._sites import (
    TextAttention,
    prompt_layouts,
    prompts_of,
    self_attention,
    text_attention,
)
from methods_multimodal.cross_attention.word_maps_record import WordMaps
from mm_adapters import Call, InputError, Model, Read, Run, TokenLayout

KEEPS = ("step", "head")
ENDS = {"<start>": ("start",), "<end>": ("end",), "<pad>": ("pad",)}
# Self-attention is read at the finest resolution with at most so many positions, and at so many steps, evenly
# spaced: one, in the middle of the run, tells where things are as well as five do (IoU on tiny-sd).
MOST_POSITIONS, AFFINITY_STEPS = 1024, 1


@dataclass
class Fold:
    """Takes what a site shows at each call, and holds its sum, or every step's own.

    As the `reduce` of a `Read` it hands nothing on, so that nothing but its sum is kept. Of a sampler that
    calls its denoiser more than once a step, a step's own is the mean of its calls.
    """

    of: Callable[[Tensor], Tensor]
    each_step: bool = False
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)

    def __call__(self, value: Tensor, call: Call) -> Tensor:
        return self.add(self.part(value, call), call)

    def part(self, value: Tensor, call: Call) -> Tensor:
        """What a value adds."""
        return self.of(value.detach())

    def add(self, part: Tensor, call: Call) -> Tensor:
        """Adds it, and returns nothing to keep."""
        at = call.step if self.each_step else 0
        if at in self.sums:
            self.sums[at] += part
        else:
            self.sums[at] = part
        self.counts[at] = self.counts.get(at, 0) + 1
        self.steps.add(call.step)
        return part.new_zeros(0)

    @property
    def count(self) -> int:
        """How many calls there were."""
        return sum(self.counts.values())

    def mean(self) -> Tensor:
        """The mean over calls, [1, ...], or each step's."""
        return torch.stack([total / self.counts[at] for at, total in self.sums.items()])


class Affinity:
    """The self-attention of one layer, averaged over heads, from its queries and keys.

    The pattern itself would cost the layer its fused kernel; of a fine resolution, with a number for
    every pair of pixels, nothing is formed.
    """

    def __init__(self) -> None:
        self.fold = Fold(lambda x: x)
        self._query: Tensor | None = None

    def query(self, value: Float[Tensor, "image pixel head d"]) -> Tensor:
        """The `reduce` of a read of the queries; they come before the keys."""
        self._query = value.detach() if value.shape[1] <= MOST_POSITIONS else None
        return value.new_zeros(0)

    def __call__(self, value: Float[Tensor, "image pixel head d"], call: Call) -> Tensor:
        """As the `reduce` of a read of the keys."""
        return self.add(self.part(value, call), call)

    def part(self, value: Float[Tensor, "image pixel head d"], call: Call) -> Tensor:
        """What a call's keys add; nothing, of a fine resolution."""
        if self._query is None:
            return value.new_zeros(0)
        query, self._query = self._query, None
        q, k = (rearrange(x.float(), "i p h d -> i h p d") for x in (query, value.detach()))
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)

    def add(self, part: Tensor, call: Call) -> Tensor:
        """Adds it, and returns nothing to keep."""
        return self.fold(part, call) if part.numel() else part


@dataclass(frozen=True)
class WordReader:
    """What to read in a run to get `WordMaps` from it. One reader serves one run at a time.

    `positions[prompt][word]` are the word's tokens; `every[prompt]` those of all its words, `n_words[prompt]`
    of them, whether they have maps or not.
    """

    words: tuple[tuple[str, ...], ...]
    positions: tuple[tuple[tuple[int, ...], ...], ...]
    layers: tuple[TextAttention, ...]
    pixels: tuple[str, ...]
    size: str
    grid: tuple[int, int] | None
    keep: frozenset[str]
    per_prompt: int = 1
    n_steps: int | None = None
    every: tuple[tuple[int, ...], ...] = ()
    n_words: tuple[int, ...] = ()
    folds: dict[str, Fold] = field(default_factory=dict, compare=False, repr=False)
    affinities: dict[str, Affinity] = field(default_factory=dict, compare=False, repr=False)

    def reads(self) -> list[Read]:
        """Of each pattern only the sums over each word's columns are kept."""
        self.folds.clear()
        self.affinities.clear()
        for layer in self.layers:
            self.folds[layer.site("pattern")] = Fold(self._words(layer), "step" in self.keep)
        steps = None
        if self.n_steps is not None and self.pixels:
            # Spaced over the run, from the middle of each part.
            n = min(AFFINITY_STEPS, self.n_steps)
            steps = [int((i + 0.5) * self.n_steps / n) for i in range(n)]
        reads = [Read(site, reduce=fold, rows="cond") for site, fold in self.folds.items()]
        for site in self.pixels:
            self.affinities[site] = affinity = Affinity()
            name = site.rpartition(".")[0]
            reads += [
                Read(f"{name}.hook_q", affinity.query, steps, "cond"),
                Read(f"{name}.hook_k", affinity, steps, "cond"),
            ]
        if self.grid is not None:
            return reads
        return [*reads, Read(self.size, reduce=lambda x: torch.tensor(x.shape[-2:])[None], steps=[0])]

    def maps(self, run: Run) -> WordMaps:
        """The maps, from a run with these reads.

        Raises: InputError if there was a NaN, saying at which layer and step it came up first.
        """
        height, width = self.grid or _latent_size(run[self.size])
        by_grid: dict[tuple[int, int], list[Tensor]] = {}
        n_shown = max(len(prompt) for prompt in self.positions)
        layers: dict[tuple[int, int], list[TextAttention]] = {}
        for layer in self.layers:
            maps = self.folds[layer.site("pattern")].mean()
            _check_finite(maps, layer)
            grid = latent_grid(maps.shape[-2], (height, width))
            by_grid.setdefault(grid, []).append(rearrange(maps, "s i n (h c) w -> s n i w h c", h=grid[0]))
            layers.setdefault(grid, []).append(layer)
        order = sorted(by_grid, reverse=True)
        check_each_step(
            {layer.site("pattern"): self.folds[layer.site("pattern")].count for layer in self.layers}
        )
        affinity, grid = self._affinities((height, width))
        steps = max(len(fold.steps) for fold in self.folds.values())
        self.folds.clear()
        whole = {f"{h}x{w}": torch.stack(by_grid[h, w], 1) for h, w in order}
        return WordMaps(
            by_grid={grid: maps[:, :, :, :, :n_shown].contiguous() for grid, maps in whole.items()},
            words=self.words,
            n_tokens=tuple(tuple(len(p) for p in prompt) for prompt in self.positions),
            layers=tuple(tuple(x.layer for x in layers[g]) for g in order),
            stages=tuple(tuple(x.stage for x in layers[g]) for g in order),
            latent=(height, width),
            n_steps=steps,
            affinity=affinity,
            affinity_grid=grid,
            all_words={grid: maps[:, :, :, :, -1].contiguous() for grid, maps in whole.items()}
            if self.every
            else {},
        )

    def _words(self, layer: TextAttention) -> Callable[[Tensor], Tensor]:
        heads = "head" in self.keep
        most = max(len(prompt) for prompt in self.positions)
        columns: list[Tensor] = []  # Which columns are which word's, once their number is known.

        def words(pattern: Tensor) -> Tensor:
            """[image, head, pixel, column] as [image, head or 1, pixel, word]: one product, for it is
            done at every step of every layer."""
            if not columns:
                which = torch.zeros(len(self.positions), pattern.shape[-1], most + bool(self.every))
                for i, prompt in enumerate(self.positions):
                    for j, word in enumerate(prompt):
                        which[i, layer.columns(word), j] = 1.0
                for i, (tokens, n) in enumerate(zip(self.every, self.n_words, strict=True)):
                    which[i, layer.columns(tokens), -1] = 1.0 / max(n, 1)
                columns.append(which.repeat_interleave(self.per_prompt, 0).to(pattern.device))
            if heads:
                return pattern.float() @ columns[0][:, None]
            return torch.bmm(pattern.mean(1, dtype=torch.float32), columns[0])[:, None]

        return words

    def _affinities(self, latent: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        means = [a.fold.mean()[0] for a in self.affinities.values() if a.fold.sums]
        self.affinities.clear()
        sizes = {x.shape[-1] for x in means}
        if not sizes:
            return torch.zeros(self.per_prompt * len(self.words), 0, 0), (0, 0)
        most = max(sizes)
        return torch.stack([x for x in means if x.shape[-1] == most]).mean(0), latent_grid(most, latent)


def word_reader(
    model: Model,
    prompt: Any,
    words: Sequence[str] | Sequence[Sequence[str]] | str | None = None,
    *,
    keep: Collection[str] = ("step",),
    spread: bool = False,
    denoiser: str = "denoiser",
    per_prompt: int = 1,
    n_steps: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> WordReader:
    """A reader of words or phrases of a prompt, or of each prompt of a list.

    words: those to see, the same for all prompts or a list for each; "tokens" for every token from
    start to end; None for all words. "<start>", "<end>" and "<pad>" are the special tokens.
    keep: "step" and "head" (the axes that are not averaged). spread: self-attention too, for the
    recipe of that name.

    Raises: WordNotFoundError if a word is not in the prompt, listing the words that are; InputError if
    the prompt is no string, or nothing attends to words.
    """
    unknown = set(keep) - set(KEEPS)
    if unknown:
        raise InputError(f"keep={sorted(unknown)}: what can be kept is {', '.join(KEEPS)}.")
    prompts = prompts_of({"prompt": prompt})
    text_attention(model, denoiser)  # Says so if there is none.
    layouts = prompt_layouts(model, prompts, options)
    layers = text_attention(model, denoiser, layouts[0])
    words_shown = [_shown(words, i, layout) for i, layout in enumerate(layouts)]
    positions = tuple(
        tuple(tuple(find(layout, word)) for word in shown)
        if words != "tokens"
        else tuple((p,) for p in _tokens(layout))
        for layout, shown in zip(layouts, words_shown, strict=True)
    )
    pixels = self_attention(model, denoiser) if spread else ()
    return WordReader(
        words=tuple(tuple(shown) for shown in words_shown),
        positions=positions,
        layers=layers,
        pixels=tuple(pixels),
        size=f"{denoiser}.hook_in",
        grid=layouts[0].grid,
        keep=frozenset(keep),
        per_prompt=per_prompt,
        n_steps=n_steps,
        every=tuple(tuple(p for w in layout.words[0] for p in w.positions) for layout in layouts),
        n_words=tuple(len(layout.words[0]) for layout in layouts),
    )


def find(layout: TokenLayout, word: str) -> list[int]:
    """The positions of a word, a phrase, or of "<start>", "<end>", "<pad>".

    Raises: WordNotFoundError listing the words there are.
    """
    if word in ENDS:
        return [p for role in ENDS[word] for p in layout.positions(role)]
    return layout.where(word)


def _latent_size(value: Tensor) -> tuple[int, int]:
    """The latents' height and width: as this reader keeps them, or of latents that another one keeps."""
    height, width = value.shape[-2:] if value.is_floating_point() else value.flatten().tolist()
    return int(height), int(width)


def _tokens(layout: TokenLayout) -> list[int]:
    return [p for p, role in enumerate(layout.roles[0]) if role not in ("pad", "latent")]


def _shown(words: Any, index: int, layout: TokenLayout) -> list[str]:
    if words == "tokens":
        names = {p: w.text for w in (*layout.words[0], *layout.marks[0]) for p in w.positions}
        ends = {"start": "<start>", "end": "<end>"}
        return [names.get(p) or ends.get(layout.roles[0][p], str(p)) for p in _tokens(layout)]
    if words is None:
        shown = list(dict.fromkeys(w.text for w in layout.words[0]))
    elif isinstance(words, str):
        shown = [words]
    elif words and not isinstance(words[0], str):
        shown = list(words[index])
    else:
        shown = list(words)
    if not shown:
        raise InputError(f"Prompt {index} has no words, so there are no word maps.")
    return shown


def _check_finite(maps: Tensor, layer: TextAttention) -> None:
    if bool(maps.isfinite().all()):
        return
    bad = (~maps.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    where = f" at step {bad[0]}" if len(maps) > 1 else ""
    raise InputError(
        f"{layer.site('pattern')} holds NaN{where}: the run has broken down, as half precision does on large "
        "activations. Run it in float32 or bfloat16."
    )
