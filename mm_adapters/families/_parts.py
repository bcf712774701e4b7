"""Towers and models that several families are: a decoder, a projector, a model of images and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mm_adapters.records import (
    ImageTokens,
    Input,
    Location,
    ModelRecord,
    Output,
    Stack,
    Tower,
    TowerMount,
    VideoTokens,
    gated_mlp,
    mlp,
    norm,
    qkv_attention,
)


def projector(
    name: str, *classes: str, inside: Mapping[str, Location] | None = None, packed: bool = False, **more: Any
) -> Tower:
    """What maps a vision tower's states to a language tower's, of these transformers classes."""
    before: dict[str, Location] = {"hook_in": Input("")}
    return Tower(
        name,
        "projector",
        tuple(f"transformers:{c}" for c in classes),
        {},
        before=before | dict(inside or {}),
        after={"hook_out": Output("")},
        norm=None,
        takes="",
        gives="",
        pool="none",
        packed=packed,
        **more,
    )


def decoder(
    name: str,
    *classes: str,
    blocks: Stack,
    final: str = "norm",
    kind: Literal["LN", "RMS"] = "RMS",
    offset: float = 0.0,
    **more: Any,
) -> Tower:
    """A causal language tower of these transformers classes, its blocks in `layers`."""
    return Tower(
        name,
        "language",
        tuple(f"transformers:{c}" for c in classes),
        {"blocks": blocks},
        # The layers' input: a composite model embeds words and images itself.
        before={"hook_embed": Input("layers.0")},
        after=norm(final, "ln_final", kind, offset),
        norm=kind,
        takes="input_ids",
        gives="last_hidden_state",
        pool="each",
        embed="embed_tokens.weight",
        causal=True,
        **more,
    )


def vlm(
    name: str,
    *classes: str,
    towers: Mapping[str, TowerMount],
    images: ImageTokens | None = None,
    videos: VideoTokens | None = None,
    prompt: str | None = "{image_token}",
) -> ModelRecord:
    """A model of images and text, of these transformers classes; with `videos`, also of videos."""
    named = tuple(f"transformers:{c}" for c in classes)
    video_token = None if videos is None else "video_token_id"
    return ModelRecord(name, "vlm", named, towers, image_token="image_token_id", images=images,
                       video_token=video_token, videos=videos, prompt=prompt)  # fmt: skip


def language(path: str, tower: str | None = None) -> TowerMount:
    """A language tower whose words the whole model predicts, by its `lm_head`."""
    return TowerMount(path, tower, run="", gives="logits", takes="input_ids", project="lm_head.weight.T")


def davit_block(path: str, heads: str) -> dict[str, Location]:
    """A block of DaViT: its attention is among patches or among channels."""
    return (
        {"hook_resid_pre": Input("", is_map=True)}
        | norm("norm1", "ln1")
        | qkv_attention(path, heads=heads)
        | {"hook_attn_out": Output(path)}
        | norm("norm2", "ln2")
        | mlp("ffn")
        | {"hook_mlp_out": Output("ffn"), "hook_resid_post": Output("", is_map=True)}
    )


def t5_mlp(path: str) -> dict[str, Location]:
    return gated_mlp(f"{path}.DenseReluDense", gate="wi_0", up="wi_1", down="wo")
