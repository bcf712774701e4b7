"""Does a script written for HookedTransformer run on a tower of CLIP or of LLaVA?

`script` below is TransformerLens' own vocabulary, as in its Main Demo and its Exploratory Analysis
Demo. Only the line that makes `model` has changed.

python examples/04_transformer_lens_script.py --out script.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformer_lens.utilities as utils
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import patching

import mm_adapters as mm
from methods_multimodal.plots import heatmap
from mm_adapters.zoo import sample_images


def script(
    model: Any,
    prompt: str,
    corrupted_prompt: str,
    answers: tuple[str, str],
    logit_diff: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    tokens, corrupted_tokens = model.to_tokens(prompt), model.to_tokens(corrupted_prompt)
    print(model.cfg.tower, model.to_str_tokens(prompt)[-12:])
    logits, cache = model.run_with_cache(tokens)
    corrupted_logits, _ = model.run_with_cache(corrupted_tokens)
    clean_diff, corrupted_diff = logit_diff(logits), logit_diff(corrupted_logits)

    # Logit attribution: the residual stream's parts along the answers' directions.
    first, second = (model.tokens_to_residual_directions(answer) for answer in answers)
    direction = first - second
    residual, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
    by_part = cache.apply_ln_to_stack(residual, layer=-1, pos_slice=-1)[:, 0] @ direction
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    by_head = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=-1)[:, 0] @ direction
    by_head = by_head.reshape(model.cfg.n_layers, model.cfg.n_heads)
    best = int(by_part.argmax())
    share = float(by_part[best])
    print(f"  logit difference {float(clean_diff):+z.4f}, of which {labels[best]} {share:+z.4f}")

    # Activation patching of every head.
    def metric(patched_logits: Tensor) -> Tensor:
        return (logit_diff(patched_logits) - corrupted_diff) / (clean_diff - corrupted_diff)

    patched = patching.get_act_patch_attn_head_out_all_pos(model, corrupted_tokens, cache, metric)

    # A hook of one's own, which knows its name and layer.
    def ablate_head(z: Tensor, hook: Any, head_index: int) -> Tensor:
        print(f"  ablating head {head_index} at {hook.name}, layer {hook.layer()}")
        z[:, :, head_index, :] = 0.0
        return z

    layer, head = divmod(int(by_head.abs().argmax()), model.cfg.n_heads)
    hooks = [(utils.get_act_name("z", layer), partial(ablate_head, head_index=head))]
    ablated = model.run_with_hooks(tokens, fwd_hooks=hooks)
    print(f"  logit difference without it {float(logit_diff(ablated)):+z.4f}")
    pattern = cache["pattern", layer][0, head]
    return {"by_part": by_part, "by_head": by_head, "patched": patched, "pattern": pattern}


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clip", default="tiny-clip")
    parser.add_argument("--llava", default="tiny-llava")
    parser.add_argument("--out", type=Path, default=Path("script.png"))
    args = parser.parse_args(argv)

    with torch.no_grad():
        # model = HookedTransformer.from_pretrained("gpt2-small")
        whole = mm.load(args.llava)
        model = whole.language
        answers = (" red", " blue")
        ids = [model.to_single_token(answer) for answer in answers]
        looking = whole.prepare(text="<image>\n", images=[sample_images()["red_circle"]])
        picture = "".join(model.to_str_tokens(looking["input_ids"])[1:])
        with model.given(pixel_values=looking["pixel_values"]):
            llava = script(
                model,
                picture + "question: what colour is the circle? answer:",
                picture + "question: what shape is the circle? answer:",
                answers,
                lambda logits: logits[0, -1, ids[0]] - logits[0, -1, ids[1]],
            )

        model = mm.load(args.clip).text
        answers = ("a photo of a red circle", "a photo of a blue circle")
        # A CLIP tower's unembedding is the zero-shot classifier of some texts.
        model.set_classes(list(answers))
        clip = script(
            model, "a red circle", "a blue circle", answers, lambda logits: logits[0, 0] - logits[0, 1]
        )

    figure = Figure(figsize=(14, 8), layout="constrained")
    for row, name, found in zip(figure.subplots(2, 3), ("language", "text"), (llava, clip), strict=True):
        heads: dict[str, Any] = {
            "signed": True,
            "label_rows": "layer",
            "label_columns": "head",
            "write": "+z.2f",
        }
        heatmap(found["by_head"], row[0], unit="logit difference", title=f"{name}: attribution", **heads)
        heatmap(
            found["patched"], row[1], unit="effect (0 corrupted, 1 clean)", title="patching heads", **heads
        )
        where: dict[str, Any] = {"label_rows": "query", "label_columns": "key", "unit": "attention weight"}
        heatmap(found["pattern"], row[2], title="pattern of the strongest head", **where)
    figure.savefig(args.out, dpi=110)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
