"""The page on where a VLM's answer comes from: restored states, blocked flows, heads that raise it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.grids import one_grid
from methods_multimodal.core.kept import Kept, kept
from methods_multimodal.core.model import check_sites
from methods_multimodal.patching import (
    CausalTrace,
    HeadImportance,
    InformationFlow,
    PositionImportance,
    answer_logits,
    head_importance,
    information_flow,
    other_pictures,
    position_importance,
    token_roles,
    trace,
)
from methods_multimodal.plots import flow_lines, head_importance_grid, heatmap, picture, trace_grid
from methods_multimodal.report._page import LETTERS, Report, new_page, rounded
from methods_multimodal.report.vlm import TOWER, name_of, prompt_of
from mm_adapters import InputError, Model, TokenLayout
from mm_adapters.inputs.images import to_rgb

# Among how many heads the one is sought that reads the image.
_READERS = 4
NEEDED = ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_attn_scores", "ln_final.hook_scale")


@dataclass(frozen=True)
class Evidence:
    """What the page shows: `answers` are the likeliest first tokens, `other` what A's is set against."""

    answers: tuple[str, str]
    other: str
    trace: CausalTrace
    flow: InformationFlow
    heads: HeadImportance
    read: PositionImportance
    layout: TokenLayout

    @property
    def patches(self) -> Float[Tensor, "down across"]:
        """What the strongest head's reading of each patch adds to the answer's log probability."""
        assert self.layout.grid is not None
        values = torch.full(self.layout.grid, 0.0)
        for position, place in enumerate(self.layout.patches[0]):
            if place is not None:
                values[place] = self.read.increase[0, 0, position]
        return values


def flow_report(
    model: Model,
    images: Sequence[Any],
    question: str,
    names: Sequence[str] = ("image", "counterpart"),
    *,
    window: int = 1,
    model_name: str = "",
    folder: str | Path | None = None,
) -> Report:
    """Says where the first token of the answer about the first image comes from.

    Args:
        model: A VLM.
        images: The image, and a counterpart of the same size, best with another answer.
        question: About both.
        names: What to call them.
        window: In how many layers at once flows are blocked.
        model_name: Its name on the page.
        folder: Where parts are written down as they are done.

    Raises: MissingSiteError if the language tower does not attend to the image's patches or unembed one
        stream; InputError if there are not two images of one size, or no question.
    """
    check_sites(model, [f"{TOWER}.{part}" for part in NEEDED])
    _ = model.check_tower(TOWER).unembedding
    if len(images) != 2 or not question.strip():
        raise InputError(
            f"This report compares two images and takes a question; there are {len(images)}, {question!r}."
        )
    clean, corrupted = (model.prepare(text=[prompt_of(model, question)], images=[image]) for image in images)
    one_grid(layout := model.layout(**clean)[TOWER], TOWER)
    pair = other_pictures(model, clean, corrupted)
    with kept(
        folder, job="flow_report", models={"model": model}, data=[clean, corrupted], window=window
    ) as work:
        evidence = _gather(model, clean, pair, window, layout, work)
    return _draw(
        evidence, [np.asarray(to_rgb(image)) for image in images], question, names, model_name or model.name
    )


def _gather(
    model: Model, clean: Mapping[str, Any], pair: Any, window: int, layout: TokenLayout, work: Kept
) -> Evidence:
    view = model.check_tower(TOWER)
    last = int(model.row_positions(clean, tower=TOWER)[0])
    logits = [view.vocabulary_logits(model.run(x).output)[0, last] for x in (clean, pair.inputs)]
    first, answer = (int(of.argmax()) for of in logits)
    # Where both have one answer, what it is compared with is the next likeliest.
    other = int(logits[0].topk(2).indices[1]) if first == answer else answer
    name = name_of(model)
    metric = answer_logits(model, clean, [first], [other])
    roles = token_roles(model, clean)
    heads = work.record("heads", HeadImportance, lambda: head_importance(model, clean, [first]))
    best = work.record(
        "read", PositionImportance, lambda: position_importance(model, clean, [first], heads.top(_READERS))
    )
    # Of the heads that raise the answer most, the one that takes most of it from the image.
    reader = int((best.increase[0] * roles["image"][0].to(best.increase)).sum(1).argmax())
    read = replace(best, increase=best.increase[:, [reader]], heads=(best.heads[reader],))
    return Evidence(
        answers=(name(first), name(answer)),
        other=name(other),
        trace=work.record("trace", CausalTrace, lambda: trace(model, clean, pair, metric, roles)),
        flow=work.record(
            "flow",
            InformationFlow,
            lambda: information_flow(model, clean, metric, roles=roles, window=window),
        ),
        heads=heads,
        read=read,
        layout=layout,
    )


def _draw(
    found: Evidence, pictures: Sequence[Any], question: str, names: Sequence[str], model_name: str
) -> Report:
    gap = f"{found.answers[0]!r} − {found.other!r}"
    figure = new_page(15.0, 8.5, fill(f"{model_name}: {question}", 120))
    axes = figure.subplots(2, 3, gridspec_kw={"width_ratios": [1, 1.4, 1.2]}).ravel()
    for ax, letter, shown, name, answer in zip(
        (axes[0], axes[3]), LETTERS, pictures, names, found.answers, strict=True
    ):
        picture(shown, ax, title=fill(f"{letter}: {name}", 34) + f"\n{answer!r}")
    trace_grid(found.trace, axes[1], title="states of A put into the run of B")
    flow_lines(found.flow, axes[4], unit=f"logit {gap}", title="attention blocked, window by window")
    head_importance_grid(found.heads, axes[2], title=f"heads: increase of log p({found.answers[0]!r}) in A")
    layer, head = found.read.heads[0]
    heatmap(
        found.patches,
        axes[5],
        unit="increase of log p (nats)",
        signed=True,
        title=f"what head {layer}.{head} reads from each patch of A",
    )
    share, effect = found.trace.share().mean, found.flow.effect.mean(-1)
    w, r = divmod(int(share.argmax()), share.shape[1])
    f, at = divmod(int(effect.argmin()), effect.shape[1])
    lines = (
        f"{gap}: {float(found.trace.clean[0]):+z.2f} with {names[0]}, "
        f"{float(found.trace.corrupted[0]):+z.2f} with "
        f"{names[1]}",
        f"restoring {found.trace.roles[r]} at layer {found.trace.windows[w][0]} gives back "
        f"{float(share[w, r]):.0%}",
        f"blocking {' to '.join(found.flow.flows[f])} in layer {found.flow.windows[at][0]} costs most: "
        f"{float(effect[f, at]):+z.2f}",
        f"of the heads that raise it most {layer}.{head} reads the image: "
        f"{float(found.heads.increase[0, layer, head]):+z.2f} nats",
    )
    numbers = {
        "model": model_name,
        "question": question,
        "answers": list(found.answers),
        "roles": list(found.trace.roles),
        "restored share": rounded(share),
        "flows": [" to ".join(flow) for flow in found.flow.flows],
        "windows": [list(window) for window in found.flow.windows],
        "blocked": rounded(effect),
        "heads": rounded(found.heads.increase[0]),
        "patches": rounded(found.patches),
    }
    return Report(figure, numbers, lines)
