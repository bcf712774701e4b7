"""Where a denoiser's image positions attend to the words of a prompt, whichever way its blocks do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mm_adapters import InputError, MissingSiteError, Model, TokenLayout


@dataclass(frozen=True)
class TextAttention:
    """One layer in which image positions attend to text.

    `name` is the attention's ("denoiser.blocks.3.cross_attn"), `stage` "down", "mid" or "up" in a
    UNet. Where text and image attend as one sequence, `text` and `pixels` are the positions of each
    in it, and the pattern is the part that goes from the one to the other; else both are None.
    """

    layer: int
    name: str
    stage: str
    text: tuple[int, ...] | None = None
    pixels: tuple[int, ...] | None = None

    def site(self, part: str) -> str:
        """The name of one of its sites: "pattern", "attn_scores", "k", "v", "z"."""
        joined = part == "pattern" and self.text is not None
        return f"{self.name}.hook_pattern_text" if joined else f"{self.name}.hook_{part}"

    def columns(self, positions: Sequence[int]) -> list[int]:
        """Which columns of the pattern are these positions of the layout."""
        return list(positions) if self.text is None else [self.text.index(p) for p in positions]

    def of_text(self, table: Tensor) -> Tensor:
        """What is laid out by positions, [..., position], as the pattern's columns are."""
        return table if self.text is None else table[..., list(self.text)]


def text_attention(
    model: Model, denoiser: str = "denoiser", layout: TokenLayout | None = None
) -> tuple[TextAttention, ...]:
    """Every layer that attends to text, in the order they run.

    `layout` says which positions of a joint attention are text and which pixels.

    Raises: MissingSiteError if nothing attends to text.
    """
    crossed = [s for s in model.sites(f"{denoiser}.*cross_attn.hook_pattern") if s.reason is None]
    if crossed:
        return tuple(TextAttention(int(s.layer or 0), _owner(s.name), _stage(s.module)) for s in crossed)
    joint = [s for s in model.sites(f"{denoiser}.*attn.hook_pattern_text") if s.reason is None]
    if joint:
        text, pixels = (), ()
        if layout is not None:
            pixels = tuple(layout.positions("latent"))
            text = tuple(p for p in range(layout.n_pos) if p not in set(pixels))
        return tuple(TextAttention(i, _owner(s.name), "", text, pixels) for i, s in enumerate(joint))
    have = ", ".join(model.towers)
    raise MissingSiteError(
        f"Nothing in {denoiser!r} attends to words: {model.name} has no "
        f"{denoiser}.*cross_attn.hook_pattern, so there are no words to see or control. "
        f"This model's towers: {have}."
    )


def self_attention(model: Model, denoiser: str = "denoiser") -> tuple[str, ...]:
    """The sites at which pixels attend to pixels alone, in the order they run."""
    joint = {_owner(s.name) for s in model.sites(f"{denoiser}.*attn.hook_pattern_text")}
    names = [s.name for s in model.sites(f"{denoiser}.*.attn.hook_pattern") if s.reason is None]
    return tuple(name for name in names if _owner(name) not in joint)


def prompt_layouts(
    model: Model, prompts: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[TokenLayout, ...]:
    """Which positions are which word of each prompt, padded as the pipeline pads it.

    Where text and image attend as one, the positions of that sequence; `options` are the
    pipeline's, for the picture's size.

    Raises: MissingSiteError if the model reads no prompt; InputError for prompts of several lengths, where a
    pipeline pads them to the longest.
    """
    reader = text_reader(model)
    loop = model.record.loop
    sizes = {k: v for k, v in (options or {}).items() if k in ("height", "width", "max_sequence_length")}
    joint = loop is not None and model.towers[loop].record.joint is not None
    if joint or "max_sequence_length" in sizes:
        name = reader if loop is None or not joint else loop
        layouts = tuple(model.layout(text=[prompt], **sizes)[name] for prompt in prompts)
        if len({layout.n_pos for layout in layouts}) > 1:
            lengths = ", ".join(str(len(text_positions(layout))) for layout in layouts)
            raise InputError(
                f"Prompts of {lengths} tokens: {model.name} pads prompts to the longest, so where "
                "the picture begins depends on what else is in the batch. Give one at a time, or as many "
                "tokens each."
            )
        return layouts
    return tuple(model.prompt_layout(reader, [prompt]) for prompt in prompts)


def text_reader(model: Model) -> str:
    """The tower whose tokens are the words that a denoiser attends to: "text", or the first that reads text.

    Raises: MissingSiteError if the model reads no prompt.
    """
    reads = [name for name, tower in model.towers.items() if tower.role == "text"]
    if reads and "text" not in reads:
        return reads[0]
    return model.check_tower("text").name


def prompts_of(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The prompts of a pipeline's inputs.

    Raises: InputError if there is none, or one is no string.
    """
    prompt = inputs.get("prompt", inputs.get("text"))
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(
            f"Words are those of a prompt, a string, or of a list of them; this is {type(prompt).__name__}."
        )
    return tuple(prompts)


def text_positions(layout: TokenLayout) -> list[int]:
    """The positions that are no pixel's."""
    return [p for p, role in enumerate(layout.roles[0]) if role != "latent"]


def _owner(site: str) -> str:
    return site.rpartition(".")[0]


def _stage(module: str) -> str:
    for part in module.split("."):
        for stage in ("down", "mid", "up"):
            if part.startswith(f"{stage}_block"):
                return stage
    return ""
