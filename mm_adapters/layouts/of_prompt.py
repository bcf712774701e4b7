"""What each position of a pipeline's sequences is: prompts, also pictures; text and image as one."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.layouts.spelt_out import by_prompt_words
from mm_adapters.sites.prompt_encoders import PromptEncoder, prompt_encoders
from mm_adapters.sites.site_map import SiteMap, resolve
from mm_adapters.tokens.layout import Role, TokenLayout, text_layout, vision_layout
from mm_adapters.tokens.words import Word

_APART = 1_000_000


def prompt_layout(
    encoder: PromptEncoder, context: int | None, texts: Sequence[str], options: Mapping[str, Any]
) -> TokenLayout:
    """What each position of one text encoder's prompts is, padded as the pipeline pads them.

    `context` is how many positions the encoder has, None for any; `options` are the pipeline's.
    """
    _, given = encoder.text_of({**options, "prompt": list(texts)})
    prompts = as_list(given)
    length = encoder.limit(options) or context
    spelt = encoder.spelt_out(prompts, options)
    padding = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = encoder.tokenizer(spelt, return_tensors="pt", **padding).input_ids
    return by_prompt_words(text_layout(spelt, encoder.tokenizer, ids), encoder.tokenizer, prompts)


def as_list(text: str | Sequence[str]) -> list[str]:
    """A text, or several, as a list."""
    return [text] if isinstance(text, str) else list(text)


def template_layout(
    pipeline: Any, template: tuple[str, str], tokenizer: Any, texts: Sequence[str]
) -> TokenLayout:
    """What each position is of prompts that a pipeline puts into a text of its own, padded to the longest.

    The words are those of the prompts.
    """
    around, start = (getattr(pipeline, name) for name in template)
    whole_texts = [around.format(text) for text in texts]
    limit = pipeline.tokenizer_max_length + start
    options = {"padding": True, "max_length": limit, "truncation": True, "return_tensors": "pt"}
    encoded = tokenizer(whole_texts, **options)
    whole = text_layout(whole_texts, tokenizer, encoded.input_ids, encoded.attention_mask)
    at = around.index("{}")

    def of_prompt(words_of_whole: Sequence[Word], text: str) -> tuple[Word, ...]:
        counts: Counter[str] = Counter()
        words = []
        for word in words_of_whole:
            first, last = (place - at for place in word.span)
            if first >= 0 and last <= len(text):
                key = word.text.casefold()
                words.append(replace(word, span=(first, last), occurrence=counts[key]))
                counts[key] += 1
        return tuple(words)

    words, marks = (tuple(map(of_prompt, each, texts)) for each in (whole.words, whole.marks))
    return replace(whole, texts=tuple(texts), words=words, marks=marks)


def seen_of(layout: TokenLayout, start: int, n: int | None) -> TokenLayout:
    """The layout of `n` tokens from `start` on, moved to each row's beginning if padding comes first."""
    rows = range(layout.n_rows)
    first = [next((p for p, role in enumerate(layout.roles[r]) if role != "pad"), 0) + start for r in rows]
    longest = max(sum(role != "pad" for role in layout.roles[r]) - start for r in rows)
    size = max(min(longest, n or longest), 0)

    def words(field: str) -> tuple[tuple[Word, ...], ...]:
        return tuple(
            tuple(
                replace(word, positions=tuple(p - first[r] for p in word.positions))
                for word in getattr(layout, field)[r]
                if all(0 <= p - first[r] < size for p in word.positions)
            )
            for r in rows
        )

    pads: tuple[Role, ...] = ("pad",) * size
    roles = tuple((*layout.roles[r][first[r] :], *pads)[:size] for r in rows)
    return TokenLayout(roles=roles, texts=layout.texts, words=words("words"), marks=words("marks"))


def prompt_layouts(
    pipeline: Any,
    sites: SiteMap,
    tokenizer_of: Callable[[str], Any],
    texts: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, TokenLayout]:
    """The layout of each text tower, and of a denoiser with a joint attention, for these prompts; and of
    the "image_prompt", if there is one.

    `options` are the pipeline's: `height` and `width` in pixels, `max_sequence_length`, and with an
    IP-Adapter `ip_adapter_image` or `ip_adapter_image_embeds`.
    """
    template = sites.model_record.template
    defaults = {n: p.default for n, p in inspect.signature(type(pipeline).__call__).parameters.items()}
    sizes = {k: options.get(k, defaults.get(k)) for k in ("height", "width", "max_sequence_length")}
    by_tower: dict[str, TokenLayout] = {}
    encoders = {encoder.part: encoder for encoder in prompt_encoders(pipeline, sites.model_record)}
    for name, tower in sites.towers.items():
        encoder = encoders.get(tower.path.partition(".")[0])
        if template is not None and name in sites.model_record.joint_text:
            by_tower[name] = template_layout(pipeline, template, tokenizer_of(name), texts)
        elif tower.record.role == "text" and encoder is not None:
            by_tower[name] = prompt_layout(encoder, _context(tower.module), texts, options)
    denoiser = sites.towers.get(sites.model_record.loop or "")
    joint = None if denoiser is None else denoiser.record.joint
    named = sites.model_record.joint_text
    here = [name for name in named if name in by_tower]
    # In place of an encoder that was left out (SD3 without T5) a pipeline puts zeros.
    if (
        denoiser is not None
        and joint is not None
        and all(n in by_tower or n not in sites.towers for n in named)
    ):
        n_rows = len(texts)
        parts = [
            by_tower[n] if n in here else blank_layout(n_rows, sizes["max_sequence_length"]) for n in named
        ]
        if template is not None:
            start, n = getattr(pipeline, template[1]), sizes["max_sequence_length"]
            parts = [seen_of(part, start, n) for part in parts]
        grid = _grid(pipeline, denoiser.module, sizes)
        by_tower[denoiser.name] = joint_layout(parts, grid, joint.first == "text")
    pictures = _pictures(options)
    if pictures:
        by_tower["image_prompt"] = image_prompt_layout(pipeline, sites, max(len(texts), 1), pictures)
    return by_tower


def blank_layout(n_rows: int, n_pos: int) -> TokenLayout:
    """The layout of positions that hold nothing."""
    pads: tuple[Role, ...] = ("pad",) * n_pos
    none: tuple[tuple[Word, ...], ...] = ((),) * n_rows
    return TokenLayout(roles=(pads,) * n_rows, texts=("",) * n_rows, words=none, marks=none)


def image_prompt_layout(pipeline: Any, sites: SiteMap, n_rows: int, n_pictures: int) -> TokenLayout:
    """The tokens that an IP-Adapter makes of its pictures: the keys of `image_prompt.hook_pattern`.

    A token is of a whole picture; which one, `image_index` says.

    Raises: InputError if no adapter is loaded.
    """
    site = next((s for s in sites if s.part == "image_prompt.hook_pattern"), None)
    if site is None:
        raise InputError("No adapter reads a picture here. Load it, then wrap the pipeline again.")
    each = resolve(pipeline, site.module).processor.num_tokens[0]
    of = tuple(picture for picture in range(n_pictures) for _ in range(each))
    roles: tuple[Role, ...] = ("image",) * len(of)
    return TokenLayout(roles=(roles,) * n_rows, image_index=(of,) * n_rows)


def _pictures(options: Mapping[str, Any]) -> int:
    """How many pictures the first adapter is given for a prompt."""
    pictures_given, embeds = options.get("ip_adapter_image"), options.get("ip_adapter_image_embeds")
    if embeds is not None:
        return embeds[0].shape[1]
    first = pictures_given[0] if isinstance(pictures_given, list) else pictures_given
    return len(first) if isinstance(first, list) else int(first is not None)


def joint_layout(texts: Sequence[TokenLayout], grid: tuple[int, int], text_first: bool) -> TokenLayout:
    """Texts one after the other, and an image's latents line by line, in one sequence."""
    n_rows = texts[0].n_rows
    image = vision_layout(n_rows, grid, n_class=0, role="latent")
    order = [*texts, image] if text_first else [image, *texts]
    starts = {id(part): sum(p.n_pos for p in order[:i]) for i, part in enumerate(order)}
    rows = range(n_rows)

    def joined(field: str) -> tuple[tuple[Any, ...], ...]:
        each = [getattr(p, field) or ((None,) * p.n_pos,) * n_rows for p in order]
        return tuple(tuple(chain.from_iterable(part[row] for part in each)) for row in rows)

    def moved(field: str) -> tuple[tuple[Word, ...], ...]:
        # The same text again has its characters after those of the text before.
        return tuple(
            tuple(
                replace(
                    w,
                    positions=tuple(p + starts[id(part)] for p in w.positions),
                    span=(w.span[0] + i * _APART, w.span[1] + i * _APART),
                )
                for i, part in enumerate(texts)
                for w in getattr(part, field)[row]
            )
            for row in rows
        )

    return TokenLayout(
        roles=joined("roles"),
        grid=grid,
        patches=joined("patches"),
        image_index=joined("image_index"),
        texts=texts[0].texts,
        words=moved("words"),
        marks=moved("marks"),
    )


def _context(module: Any) -> int | None:
    return getattr(getattr(module, "config", None), "max_position_embeddings", None)


def _grid(pipeline: Any, denoiser: Any, sizes: Mapping[str, Any]) -> tuple[int, int]:
    """The rows and columns of patches: of the latent's, those that one patch packs."""
    scale = pipeline.vae_scale_factor
    packed = denoiser.config.patch_size
    # What comes in may have a picture beside the latents; what goes out has not.
    channels = getattr(denoiser.config, "out_channels", None) or denoiser.config.in_channels
    if channels == 4 * getattr(pipeline.vae.config, "latent_channels", 0):
        packed *= 2  # Four latents make one of the denoiser's channels.
    height, width = ((sizes[k] or pipeline.default_sample_size * scale) for k in ("height", "width"))
    return height // scale // packed, width // scale // packed
