"""Where in tiny-llava is the colour it is asked for: in a few directions of one token's residual stream?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyvene as pv
import torch
from PIL import Image

import mm_adapters as mm
from integrations import pyvene as mm_pv
from mm_adapters.zoo import world

SITE = "language.blocks.2.hook_resid_post"
COLOURS = list(world.COLOURS)


def pairs(
    model: mm.HookedModel, n: int, split: str, size: int = 16
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Batches of two runs that answer with different colours, and the tokens of the colours."""
    scenes = [world.scene(i, split, seed=21, kind="one", solid=True, size="large") for i in range(n)]
    images = [Image.fromarray(picture) for picture in world.render_batch(scenes)]
    text = [f"<image>\nquestion: what colour is the {s.things[0].shape}? answer:" for s in scenes]
    ready = model.prepare(text=text, images=[[image] for image in images])
    colour = torch.tensor([COLOURS.index(s.things[0].colour) for s in scenes])
    other = torch.tensor(
        [next(j % n for j in range(i + 1, i + n) if colour[j % n] != colour[i]) for i in range(n)]
    )
    last = model.row_positions(ready)
    made = []
    for at in range(0, n, size):
        b, s = torch.arange(at, min(at + size, n)), other[at : at + size]
        base, source = ({k: v[i] for k, v in ready.items()} for i in (b, s))
        places = mm_pv.units(last[b], sources=last[s])
        made.append(
            {"base": base, "sources": [source], "unit_locations": places, "label": colour[s], "last": last[b]}
        )
    # A name of several tokens is told by its first, which is what the model says next.
    ids = [model.tokenizer_of("language")(f" {c}", add_special_tokens=False).input_ids[0] for c in COLOURS]
    return made, torch.tensor(ids)


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("das.png"))
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    model = mm.load(options.model, dtype=torch.float32)
    train, tokens = pairs(model, options.pairs, "train")
    test, _ = pairs(model, 32, "test")

    def said(output: Any, batch: Any) -> torch.Tensor:
        return output.logits[torch.arange(len(batch["last"])), batch["last"]]

    def right(output: Any, batch: Any) -> torch.Tensor:
        return said(output, batch).argmax(-1) == tokens[batch["label"]]

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(said(output, batch)[:, tokens], batch["label"])

    one = mm_pv.intervention(model, SITE, pv.LowRankRotatedSpaceIntervention, low_rank_dimension=options.rank)
    subspace = mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model)
    accuracy = {"random subspace": mm_pv.interchange_accuracy(subspace, test, right)}
    mm_pv.align(subspace, train * options.epochs, loss, lr=2e-2, progress=False)
    accuracy["trained subspace"] = mm_pv.interchange_accuracy(subspace, test, right)

    figure, axis = plt.subplots(figsize=(4.6, 2.2), layout="constrained")
    bars = axis.barh(list(accuracy), list(accuracy.values()), color=["0.7", "tab:blue"])
    axis.bar_label(bars, fmt="{:.0%}", padding=3)
    axis.set(xlim=(0, 1.12), xlabel="interchange accuracy, held-out pairs")
    axis.set_title(f"{options.rank} directions of {SITE}", fontsize=9)
    figure.savefig(options.out, dpi=120)
    print(options.out)
    return options.out


if __name__ == "__main__":
    main()
