"""Does DAS find the colour in tiny-llava? Interchange accuracy on held-out pairs, beside a random subspace.

python -m tests.quality.das [--steps 96] [--site language.blocks.1.hook_resid_post] [--rank 8] [--boundless]

Two single-object scenes of different colours and the question "what colour is the SHAPE?" about each.
At each row's last token, a subspace is swapped from the second run into the first; the answer should become
the second's colour, by the first token of its name. Counted over held-out pairs of which the model answers
both rightly. `--boundless` learns the size of the subspace too; the random one beside it has the size that
was learnt.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import pyvene as pv
import torch
from PIL import Image

import mm_adapters as mm
from integrations import pyvene as mm_pv
from mm_adapters.zoo import world

SITE = "language.blocks.1.hook_resid_post"
# Boundless: how soft the subspace's edge is at first and at last, in dimensions; what its size costs.
EDGE, SIZE_COST = (8.0, 0.1), 1.0


def scenes(n: int, split: str) -> list[world.Scene]:
    return [world.scene(i, split, seed=21, kind="one", solid=True, size="large") for i in range(n)]


def prepared(model: Any, told: list[world.Scene]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The model's own arguments for each scene."""
    images = [Image.fromarray(p) for p in world.render_batch(told)]
    text = [f"<image>\nquestion: what colour is the {s.things[0].shape}? answer:" for s in told]
    ready = model.inputs.prepare(text=text, images=[[i] for i in images], padding_side="left")
    ready = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in ready.items()}
    return ready, [s.things[0].colour for s in told]


def pairs(model: Any, n: int, split: str, size: int, seed: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Batches of base and source whose colours differ, with the token of the source's colour."""
    ready, colours = prepared(model, scenes(n, split))
    tokenizer = model.inputs.tokenizer
    names = list(world.COLOURS)
    tokens = torch.tensor([tokenizer(f" {c}", add_special_tokens=False).input_ids[0] for c in names])
    code = torch.tensor([names.index(c) for c in colours])
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.permutation(n))
    source = torch.tensor([int(rng.choice(np.flatnonzero((code != code[i]).numpy()))) for i in base.tolist()])
    last = model.row_positions(ready)
    made = []
    for at in range(0, n - size + 1, size):
        b, s = base[at : at + size], source[at : at + size]
        made.append(
            {
                "base": {k: v[b] for k, v in ready.items()},
                "sources": [{k: v[s] for k, v in ready.items()}],
                "unit_locations": mm_pv.units(last[b], sources=last[s]),
                "last": last[b],
                "labels": code[s],
                "own": code[b],
            }
        )
    return made, tokens


def measure(
    site: str = SITE, rank: int | None = 8, steps: int = 96, n: int = 384, n_test: int = 128, lr: float = 1e-2
) -> dict[str, float]:
    """Interchange accuracies: trained and random subspace, whole vector; and the model's own answers.

    `rank` None: boundless, and "dimensions" among them is the size it came to.
    """
    torch.manual_seed(0)
    model = mm.load("tiny-llava", dtype=torch.float32)
    train, tokens = pairs(model, n, "train", 32, 1)
    test, _ = pairs(model, n_test, "test", 32, 2)

    def loss(output: Any, batch: Any) -> torch.Tensor:
        said = _next(output, batch["last"])[:, tokens]
        return torch.nn.functional.cross_entropy(said.float(), batch["labels"])

    def right(output: Any, batch: Any) -> torch.Tensor:
        return _next(output, batch["last"]).argmax(-1) == tokens[batch["labels"]]

    def right_if_known(output: Any, batch: Any) -> torch.Tensor:
        return right(output, batch)[batch["known"]]

    def made(kind: Any, **options: Any) -> Any:
        one = mm_pv.intervention(model, site, kind, **options)
        return mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model)

    own = [_answers(model, b["base"], tokens) == b["own"] for b in test]
    # DAS asks whether a variable that the model computes lies in a subspace: pairs it answers rightly.
    for batch, base_right in zip(test, own, strict=True):
        batch["known"] = base_right & (_answers(model, batch["sources"][0], tokens) == batch["labels"])
    order = [train[i % len(train)] for i in range(steps)]
    size = float(rank or 0)
    if rank is None:
        das, other = (made(pv.BoundlessRotatedSpaceIntervention) for _ in range(2))
        mm_pv.align(das, order, loss, lr=lr, temperature=EDGE, boundary_weight=SIZE_COST, progress=False)
        (learnt,), (fresh,) = das.interventions.values(), other.interventions.values()
        bounds = learnt.intervention_boundaries.detach().clamp(1e-3, 1)
        size = float(bounds) * int(learnt.embed_dim)
        fresh.intervention_boundaries.data.copy_(bounds)
        fresh.set_temperature(learnt.get_temperature().data)
        random = mm_pv.interchange_accuracy(other, test, right_if_known)
    else:
        das = made(pv.LowRankRotatedSpaceIntervention, low_rank_dimension=rank)
        random = mm_pv.interchange_accuracy(das, test, right_if_known)
        mm_pv.align(das, order, loss, lr=lr, progress=False)
    return {
        "the model's own answers": float(torch.cat(own).float().mean()),
        "trained subspace": mm_pv.interchange_accuracy(das, test, right_if_known),
        "trained subspace, all pairs": mm_pv.interchange_accuracy(das, test, right),
        "random subspace": random,
        "dimensions": size,
        "whole vector": mm_pv.interchange_accuracy(made(pv.VanillaIntervention), test, right_if_known),
    }


def _next(output: Any, last: torch.Tensor) -> torch.Tensor:
    """The logits of what comes after each row, [row, token]."""
    return output.logits[torch.arange(len(last)), last]


@torch.no_grad()
def _answers(model: Any, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The colour the model says, by number; -1 for another word."""
    said = _next(model.wrapped(**inputs), model.row_positions(inputs)).argmax(-1)
    hits = said[:, None] == tokens
    return torch.where(hits.any(1), hits.int().argmax(1), -1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--site", default=SITE)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--boundless", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = measure(options.site, None if options.boundless else options.rank, options.steps)
    size = found.pop("dimensions")
    for name, value in found.items():
        print(f"{name:<28} {value:6.1%}")
    ok = found["trained subspace"] >= 0.9 and found["random subspace"] < 0.4
    print(f"{size:.1f} dimensions at {options.site}: " + ("ok" if ok else "MISSED"))
    return int(not ok)


if __name__ == "__main__":
    sys.exit(main())
