"""What a contrastive tower's states say in the joint space, after each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.embed import unit
from methods_multimodal.core.model import check_pool, check_sites, check_summary
from methods_multimodal.lenses._entries import layer_names, stream_sites
from methods_multimodal.lenses.reading import LensReading
from mm_adapters import InputError, MissingSiteError, Model, Read


def clip_lens(
    model: Model,
    images: Mapping[str, Any],
    texts: Float[Tensor, "text width"],
    *,
    patches: bool = False,
    names: Sequence[str] = (),
) -> LensReading:
    """The cosine of each layer's state with texts, after the tower's own final norm and projection.

    After the last layer, at the class position, it is the cosine of the model's own embedding (`own_gap` says
    how far apart they are at most).

    Args:
        model: One with an image tower whose summary is its first position's.
        images: The tower's arguments.
        texts: Unit vectors of texts (`core.embed.embed_texts`), one a candidate.
        patches: Whether every patch is read, and not the class position.
        names: What each text is called.

    Source: nostalgebraist 2020 (the logit lens), with the projection in the unembedding's place.
    Raises: MissingSiteError if the tower has no one stream, its summary is no linear map of its first
    position, or it cuts no patches; InputError for vectors of another width.
    """
    tower = model.check_tower("vision")
    check_summary(model, tower)
    sites = stream_sites(model, tower)
    check_sites(model, [f"{tower.name}.ln_final.hook_scale"])
    check_pool(tower, "first")
    matrix, bias, norm = tower.projection, tower.projection_bias, tower.final_norm
    assert norm is not None
    pixels = images[tower.input_name]
    width = norm.gain.shape[0] if matrix is None else matrix.shape[1]
    if texts.shape[1] != width:
        raise InputError(f"The joint space has {width} dimensions, and the texts' vectors {texts.shape[1]}.")
    positions: list[int] = [0]
    places: list[Any] = [None]
    grid = None
    if patches:
        layout = tower.patch_layout(pixels)
        positions = layout.positions("patch")
        if not positions:
            raise MissingSiteError(f"The {tower.name} tower's layout has no 'patch' role.")
        places, grid = [layout.patches[0][p] for p in positions], layout.grid
    run = model.run(images, read=[Read(s, reduce=lambda x: x[:, positions]) for s in sites])
    directions = unit(texts.float())
    scores = []
    with torch.no_grad():
        for site in sites:
            states = norm.module(run[site].detach())
            joint = states if matrix is None else states @ matrix.to(states)
            joint = joint if bias is None else joint + bias.to(joint)
            scores.append((unit(joint.float()) @ directions.to(joint.device).T).flatten(0, 1))
        gap = None
        if not patches:
            own = unit(tower.summary(run.output).detach().float()) @ directions.to(scores[-1].device).T
            gap = float((own - scores[-1]).abs().max())
    n = len(pixels)
    return LensReading(
        scores=torch.stack(scores, 1),
        total=None,
        lens="CLIP",
        unit="cosine",
        layers=layer_names(len(sites)),
        candidates=tuple(names) if names else tuple(f"text {i}" for i in range(len(texts))),
        rows=tuple(row for row in range(n) for _ in positions),
        positions=tuple(positions) * n,
        patches=tuple(places) * n,
        grid=grid,
        where="patch positions" if patches else "the class position",
        own_gap=gap,
    )
