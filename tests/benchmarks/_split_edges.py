"""EAP-IG as its authors compute it, for the text tower of a CLIPModel: every reader has an input of its own.

Written from Hanna et al. 2024, arXiv 2403.17806, section 3, and Syed et al. 2023, arXiv 2310.10348: the input
of each head's queries, keys and values and of each MLP is copied, so that one backward gives each copy's
gradient; (corrupted - clean) of each source is multiplied with it. Midpoints, as in `score_edges`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from methods_multimodal.attribution import midpoints


def split_edges(
    model: Any, clean: Mapping[str, Tensor], corrupted: Mapping[str, Tensor], points: int
) -> dict[str, Tensor]:
    """Each edge's score of each row, for the logit of each image with its own text."""
    with torch.no_grad():
        image = model.get_image_features(pixel_values=clean["pixel_values"])
        image = getattr(image, "pooler_output", image)
        image = image / image.norm(dim=-1, keepdim=True)
        ends = [model.text_model.embeddings(input_ids=x["input_ids"]) for x in (clean, corrupted)]
        (before, _, _), (after, _, _) = (_forward(model, end, clean, image) for end in ends)
        moved = torch.stack([b - a for a, b in zip(before, after, strict=True)])
    totals: dict[str, Tensor] = {}
    for share in midpoints(points):
        with torch.enable_grad():
            start = (ends[0] + share * (ends[1] - ends[0])).requires_grad_()
            _, readers, metric = _forward(model, start, clean, image)
            grads = torch.autograd.grad(metric.sum(), [value for _, _, value in readers])
        for (name, n, _), grad in zip(readers, grads, strict=True):
            for source, score in zip(_sources(model)[:n], _products(moved[:n], grad), strict=True):
                edge = f"{source}->{name}"
                totals[edge] = totals.get(edge, 0) + score / points
    return totals


def _products(moved: Tensor, grad: Tensor) -> Tensor:
    return einsum(moved, grad, "s r p m, r p m -> s r")


def _sources(model: Any) -> list[str]:
    names = ["t.input"]
    for i, layer in enumerate(model.text_model.encoder.layers):
        names += [f"t.a{i}.h{h}" for h in range(layer.self_attn.num_heads)] + [f"t.m{i}"]
    return names


def _forward(
    model: Any, embedded: Tensor, inputs: Mapping[str, Tensor], image: Tensor
) -> tuple[list[Tensor], list[tuple[str, int, Tensor]], Tensor]:
    """What each source writes, each reader's own input (with how many sources are before it), the metric."""
    stream, sources, readers = embedded, [embedded], []
    n = embedded.shape[1]
    future = torch.full((n, n), -torch.inf).triu(1)
    padding = torch.zeros(inputs["attention_mask"].shape).masked_fill(
        inputs["attention_mask"] == 0, -torch.inf
    )
    for i, layer in enumerate(model.text_model.encoder.layers):
        attention = layer.self_attn
        heads = attention.num_heads
        own = {kind: repeat(stream, "r p m -> h r p m", h=heads).unbind(0) for kind in "qkv"}
        for kind, copies in own.items():
            readers += [(f"t.a{i}.h{h}<{kind}>", len(sources), copy) for h, copy in enumerate(copies)]
        made = {}
        for kind, copies in own.items():
            project = getattr(attention, f"{kind}_proj")
            weight = rearrange(project.weight, "(h d) m -> h d m", h=heads)
            bias = rearrange(project.bias, "(h d) -> h d", h=heads)
            given = layer.layer_norm1(torch.stack(copies))
            made[kind] = einsum(given, weight, "h r p m, h d m -> h r p d") + bias[:, None, None]
        scores = made["q"] @ made["k"].mT * attention.scale + future + padding[None, :, None]
        z = scores.softmax(-1) @ made["v"]
        out = rearrange(attention.out_proj.weight, "m (h d) -> h d m", h=heads)
        written = einsum(z, out, "h r p d, h d m -> h r p m")
        sources += list(written)
        middle = stream + written.sum(0) + attention.out_proj.bias
        into_mlp = middle.clone()
        readers.append((f"t.m{i}", len(sources), into_mlp))
        added = layer.mlp(layer.layer_norm2(into_mlp))
        sources.append(added)
        stream = middle + added
    last = stream.clone()
    readers.append(("logits", len(sources), last))
    ends = inputs["input_ids"].argmax(-1)
    if (eos := model.config.text_config.eos_token_id) != 2:
        ends = (inputs["input_ids"] == eos).int().argmax(-1)
    pooled = model.text_model.final_layer_norm(last)[torch.arange(len(last)), ends]
    text = model.text_projection(pooled)
    text = text / text.norm(dim=-1, keepdim=True)
    return sources, readers, model.logit_scale.exp() * (image * text).sum(-1)
