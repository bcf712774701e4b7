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
IGNORED = -100


def pairs(model: mm.HookedModel, n: int, split: str, size: int = 16) -> list[dict[str, Any]]:
    """Batches of two runs that answer with different colours; the base is followed by the source's colour."""
    scenes = [world.scene(i, split, seed=21, kind="one", solid=True, size="large") for i in range(n)]
    images = [Image.fromarray(picture) for picture in world.render_batch(scenes)]
    text = [f"<image>\nquestion: what colour is the {s.things[0].shape}? answer:" for s in scenes]
    colours = [s.things[0].colour for s in scenes]
    other = [next(j % n for j in range(i + 1, i + n) if colours[j % n] != colours[i]) for i in range(n)]
    labels = [colours[j] for j in other]
    tokenizer = model.tokenizer_of("language")
    # An answer counts as a whole: "purple" is two tokens.
    spelled = [tokenizer(f" {label}", add_special_tokens=False).input_ids for label in labels]
    made = []
    for at in range(0, n, size):
        rows = range(at, min(at + size, n))
        base = model.prepare(
            text=[f"{text[i]} {labels[i]}" for i in rows], images=[[images[i]] for i in rows]
        )
        source = model.prepare(text=[text[other[i]] for i in rows], images=[[images[other[i]]] for i in rows])
        lengths = torch.tensor([len(spelled[i]) for i in rows])
        last = model.row_positions(base) - lengths
        targets = torch.full((len(rows), int(lengths.max())), IGNORED)
        for row, i in enumerate(rows):
            targets[row, : len(spelled[i])] = torch.tensor(spelled[i])
        places = mm_pv.units(last, sources=model.row_positions(source))
        made.append(
            {"base": base, "sources": [source], "unit_locations": places, "last": last, "targets": targets}
        )
    return made


def said(output: Any, batch: Any) -> torch.Tensor:
    """The logits of each token of the answer, [row, token, vocabulary]."""
    places = batch["last"][:, None] + torch.arange(batch["targets"].shape[1])
    # Past the end of a short answer there is nothing to read.
    places = places.clamp(max=output.logits.shape[1] - 1)
    return output.logits[torch.arange(len(places))[:, None], places]


def right(output: Any, batch: Any) -> torch.Tensor:
    """Whether the whole answer is the source's colour, [row]."""
    return ((said(output, batch).argmax(-1) == batch["targets"]) | (batch["targets"] == IGNORED)).all(1)


def loss(output: Any, batch: Any) -> torch.Tensor:
    """How unexpected the source's colour is."""
    logits = said(output, batch).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["targets"].flatten(), ignore_index=IGNORED)


def components(model: mm.HookedModel, batches: list[dict[str, Any]], rank: int) -> torch.Tensor:
    """The directions along which the sources' last states vary most, [width, direction]."""
    states = []
    for batch in batches:
        (source,) = batch["sources"]
        values = model.run(source, read=[SITE])[SITE]
        states.append(values[torch.arange(len(values)), model.row_positions(source)])
    rows = torch.cat(states)
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:rank].T


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
    train, test = pairs(model, options.pairs, "train"), pairs(model, 32, "test")
    one = mm_pv.intervention(model, SITE, pv.LowRankRotatedSpaceIntervention, low_rank_dimension=options.rank)
    subspace = mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model)
    accuracy = {"random": mm_pv.interchange_accuracy(subspace, test, right)}
    mm_pv.align(subspace, train * options.epochs, loss, lr=2e-2, progress=False)
    trained = mm_pv.interchange_accuracy(subspace, test, right)
    (directions,) = subspace.interventions.values()
    directions.rotate_layer.weight = components(model, train, options.rank)
    # Not trained, and where these suffice, that the trained ones do says little.
    accuracy["principal components"] = mm_pv.interchange_accuracy(subspace, test, right)
    accuracy["trained"] = trained

    figure, axis = plt.subplots(figsize=(4.6, 2.2), layout="constrained")
    bars = axis.barh(list(accuracy), list(accuracy.values()), color=["0.7", "0.5", "tab:blue"])
    axis.bar_label(bars, fmt="{:.0%}", padding=3)
    axis.set(xlim=(0, 1.12), xlabel="interchange accuracy, held-out pairs")
    axis.set_title(f"{options.rank} directions of {SITE}", fontsize=9)
    figure.savefig(options.out, dpi=120)
    print(options.out)
    return options.out


if __name__ == "__main__":
    main()
