"""The report on an image and texts: why does this image match this text?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import image_layout
from methods_multimodal.core.kept import Kept, kept
from methods_multimodal.core.model import check_whole_images
from methods_multimodal.core.outputs import contrast_of, probabilities
from methods_multimodal.lenses.direct_attribution import LogitAttribution, attribute_logits
from methods_multimodal.patching.activation_patching import (
    ActivationPatching,
    patch_heads,
    patch_positions,
)
from methods_multimodal.plots import head_shares, heatmap, mlp_shares, mosaic, patch_effects, picture, tiles
from methods_multimodal.relevance.attention_maps import HeadMaps, head_maps
from methods_multimodal.report._page import (
    LETTERS,
    PATCHED_ROWS,
    Report,
    as_seen,
    new_page,
    rounded,
    say,
    spread,
    strongest,
    windows,
)
from mm_adapters import InputError, MissingSiteError, Model

TOWER = "vision"


@dataclass(frozen=True)
class Evidence:
    """Everything the page shows. `attribution` is None, with a reason, where there is none."""

    logits: Float[Tensor, "image text"]
    maps: HeadMaps
    attribution: LogitAttribution | None
    no_attribution: str
    heads: ActivationPatching
    patches: ActivationPatching
    grid: tuple[int, int]


def contrastive_report(
    model: Model,
    images: Sequence[Any],
    texts: Sequence[str],
    names: Sequence[str] = ("image", "counterpart"),
    *,
    model_name: str = "",
    folder: str | Path | None = None,
) -> Report:
    """Explains the first image's logit for the first text (against the second, if there is one).

    The second image is what activation patching compares the first with. `model_name` is the model's
    name on the page. With a `folder`, parts are written down as they are done, and are not made again.

    Raises: MissingSiteError if the model sees no images, cuts no patches, or captions what it compares;
    InputError if there are not two images, or no text.
    """
    _check(model)
    if len(images) != 2 or not texts:
        raise InputError(
            f"This report compares two images and takes a text; there are {len(images)} and {len(texts)}."
        )
    words, shown = model.prepare(text=list(texts)), model.prepare(images=list(images))
    with kept(folder, job="contrastive_report", models={"model": model}, data=[words, shown]) as work:
        evidence = _gather(model, words, shown, texts, work)
    (pixels,) = (v for v in shown.values() if v.ndim == 4)
    return _draw(model, evidence, [as_seen(model, p) for p in pixels], texts, names, model_name or model.name)


def _check(model: Model) -> None:
    check_whole_images(model.check_tower(TOWER))
    model.check_site(f"{TOWER}.blocks.0.attn.hook_pattern")
    if any(tower.role == "language" for tower in model.towers.values()):
        raise MissingSiteError(
            f"{model.name}: its forward pairs each image with one text, which it captions, so two images "
            "have no logits for all of the texts."
        )


def _gather(
    model: Model, words: Mapping[str, Tensor], shown: Mapping[str, Tensor], texts: Sequence[str], work: Kept
) -> Evidence:
    (pixels,) = (v for v in shown.values() if v.ndim == 4)
    layout = image_layout(model, pixels, TOWER)
    n_layers = model.check_tower(TOWER).n_layers()
    both = {**words, **shown}
    clean, corrupted = ({**words, **{k: v[[i]] for k, v in shown.items()}} for i in (0, 1))

    def metric(output: Any) -> Tensor:
        logits = contrast_of(output).logits
        return logits[:, 0] - logits[:, 1] if len(texts) > 1 else logits[:, 0]

    reason, attribution = "", None
    try:
        attribution = work.record(
            "attribution", LogitAttribution, lambda: attribute_logits(model, both, texts=texts)
        )
    except MissingSiteError as error:
        reason = f"No logit attribution: {error}"
    every: dict[str, Any] = {"tower": TOWER, "stacked": set(shown), "batch": PATCHED_ROWS}
    groups, grid = windows(layout)
    query, name = (0, "class token") if "class" in layout.roles[0] else (None, "average position")
    layers = range(n_layers)
    looked: dict[str, Any] = {"tower": TOWER, "layers": layers, "query": query, "query_name": name}
    few: dict[str, Any] = {"layers": spread(n_layers), "units": groups, **every}
    logits = work.tensors("logits", lambda: {"": contrast_of(model.run(both).output).logits.float()})[""]
    return Evidence(
        logits=logits,
        maps=work.record("maps", HeadMaps, lambda: head_maps(model, both, layout, **looked)),
        attribution=attribution,
        no_attribution=reason,
        heads=work.record(
            "heads",
            ActivationPatching,
            lambda: patch_heads(
                model, clean, corrupted, metric, layers=layers, folder=work.inside("patched heads"), **every
            ),
        ),
        patches=work.record(
            "patches",
            ActivationPatching,
            lambda: patch_positions(
                model, clean, corrupted, metric, folder=work.inside("patched patches"), **few
            ),
        ),
        grid=grid,
    )


def _draw(
    model: Model,
    evidence: Evidence,
    pictures: Sequence[Any],
    texts: Sequence[str],
    names: Sequence[str],
    model_name: str,
) -> Report:
    target = f"“{texts[0]}” − “{texts[1]}”" if len(texts) > 1 else f"“{texts[0]}”"
    page = new_page(17.0, 15.0, f"{model_name}: why this logit?  target: {target}")
    grid = page.add_gridspec(3, 3)
    likely = probabilities(evidence.logits)
    for i, name in enumerate(names):
        captions = [
            f"{float(evidence.logits[i, t]):+z.2f}  p={float(likely[i, t]):.3f}  {text}"
            for t, text in enumerate(texts[:6])
        ]
        picture(
            pictures[i],
            page.add_subplot(grid[0, i]),
            title=f"{LETTERS[i]}: {name}, as the model sees it",
            caption="\n".join(captions),
        )
    heatmap(
        evidence.logits,
        page.add_subplot(grid[0, 2]),
        unit="logit",
        signed=True,
        write="+z.2f",
        rows=list(LETTERS),
        columns=[_short(t) for t in texts],
        title="the model's logits",
    )
    mosaic(
        evidence.maps,
        page.add_subplot(grid[1, 0]),
        title=f"A: attention of the {evidence.maps.query} over patches",
    )
    shares = evidence.attribution
    if shares is None:
        say(page.add_subplot(grid[1, 1:]), evidence.no_attribution)
    else:
        shares = shares.minus(0, 1) if len(texts) > 1 else shares
        head_shares(shares, page.add_subplot(grid[1, 1]))
        bars = mlp_shares(shares, page.add_subplot(grid[1, 2]))
        bars.set_title(f"{bars.get_title()}\nresidual {shares.residual:.1e} of the logit", fontsize=10)
    patch_effects(evidence.heads, page.add_subplot(grid[2, 0]), title="patching each head of A into B")
    tiles(
        rearrange(
            evidence.patches.effect[0], "layer (down across) -> layer down across", down=evidence.grid[0]
        ),
        page.add_subplot(grid[2, 1:]),
        names=[f"into layer {i}" for i in evidence.patches.layers],
        unit="effect (0 corrupted, 1 clean)",
        signed=True,
        title="patching each patch of A into B",
    )
    return Report(
        page, _numbers(model_name, evidence, texts, names), tuple(_lines(evidence, shares, texts, names))
    )


def _lines(
    evidence: Evidence, shares: LogitAttribution | None, texts: Sequence[str], names: Sequence[str]
) -> list[str]:
    likely = probabilities(evidence.logits)
    lines = [
        f"{names[i]}: {text!r} logit {float(evidence.logits[i, t]):+z.4f}, "
        f"probability {float(likely[i, t]):.4f}"
        for i in range(len(names))
        for t, text in enumerate(texts)
    ]
    if shares is None:
        return [*lines, evidence.no_attribution]
    top = ", ".join(f"layer {a} head {b} {v:+z.3f}" for a, b, v in strongest(shares.heads[0, 0]))
    return [
        *lines,
        f"attribution to {shares.texts[0]}: sum {float(shares.total[0, 0]):+z.5f}, the model's own "
        f"{float(shares.logit[0, 0]):+z.5f}, residual {shares.residual:.1e}; strongest heads: {top}",
        "strongest heads by patching: "
        + ", ".join(f"layer {a} head {b} {v:+z.3f}" for a, b, v in strongest(evidence.heads.effect[0])),
    ]


def _numbers(
    model_name: str, evidence: Evidence, texts: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    shares = evidence.attribution
    return {
        "model": model_name,
        "images": list(names),
        "texts": list(texts),
        "logits": rounded(evidence.logits),
        "probabilities": rounded(probabilities(evidence.logits)),
        "attention_class_to_patches": rounded(evidence.maps.maps[0]),
        "attribution": {"absent": evidence.no_attribution}
        if shares is None
        else {
            "embed": rounded(shares.embed),
            "heads": rounded(shares.heads),
            "attn_bias": rounded(shares.attn_bias),
            "mlps": rounded(shares.mlps),
            "final_norm_bias": rounded(shares.bias),
            "sum": rounded(shares.total),
            "logit": rounded(shares.logit),
            "residual": shares.residual,
        },
        "patching": {
            "target": "first text minus second" if len(texts) > 1 else "first text",
            "clean": float(evidence.heads.clean[0]),
            "corrupted": float(evidence.heads.corrupted[0]),
            "heads": rounded(evidence.heads.effect[0]),
            "patch_layers": list(evidence.patches.layers),
            "patch_grid": list(evidence.grid),
            "patches": rounded(evidence.patches.effect[0]),
        },
    }


def _short(text: str, n: int = 22) -> str:
    return text if len(text) <= n else f"{text[: n - 1]}…"
