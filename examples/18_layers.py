"""At which layer does tiny-llava know its answer, and how many blocks could be saved?

The logit lens and a tuned lens on held-out questions; the threshold for stopping early is chosen on others.

python examples/18_layers.py --out layers.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

import mm_adapters as mm
from methods_multimodal.lenses import EarlyExit, early_exit, joined, logit_lens, train_tuned_lens, tuned_lens
from methods_multimodal.plots import lens_maps, lens_table, picture
from mm_adapters.zoo import measures, questions, sample_images


def asked(model: Any, n: int, split: str) -> tuple[list[dict[str, Any]], list[int], list[str]]:
    """Batches of questions, the first token of each right answer, and the answers."""
    pairs = [questions.question(i, split) for i in range(n)]
    pictures = measures.images_of([scene for scene, _ in pairs])
    texts, answers = [q.prompt() for _, q in pairs], [q.answer for _, q in pairs]
    parts = range(0, n, 32)
    batches = [
        model.prepare(text=texts[i : i + 32], images=[[p] for p in pictures[i : i + 32]]) for i in parts
    ]
    tokenizer = model.tokenizer_of("language")
    return batches, [tokenizer(f" {a}", add_special_tokens=False).input_ids[0] for a in answers], answers


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("layers.png"))
    args = parser.parse_args(argv)

    model = mm.load(args.model)
    training, _, _ = asked(model, 4 * args.questions, "train")
    validation, known, _ = asked(model, args.questions, "validation")
    test, right, answers = asked(model, args.questions, "test")
    lens = train_tuned_lens(model, training, validation, test, position=-1, n_steps=24)

    def exits(batches: list[dict[str, Any]], truth: list[int], tuned: bool) -> EarlyExit:
        read = [
            tuned_lens(model, b, lens) if tuned else logit_lens(model, b, final_norm=True) for b in batches
        ]
        return early_exit(joined(read), truth)

    guess = max(answers.count(a) for a in set(answers)) / len(answers)
    for tuned, name in ((False, "logit lens"), (True, "tuned lens")):
        found = exits(test, right, tuned)
        by_layer = ", ".join(f"{n} {found.accuracy(i).mean:.0%}" for i, n in enumerate(found.layers))
        print(f"{name}: {by_layer} (the commonest answer {guess:.0%})")
        threshold = exits(validation, known, tuned).choose_threshold()
        stopped, blocks = found.accuracy_at(threshold), found.mean_layers(threshold)
        null = found.accuracy_at_shuffled(threshold)
        print(f"  stopping when {threshold:.2f} sure: {stopped.mean:.0%} after {blocks:.1f} blocks", end="")
        print(f" ({null.mean:.0%} if as many others stop)")

    image = sample_images()["red_circle_left_of_blue_square"]
    batch = model.prepare(text=["<image>\nquestion: what colour is the circle? answer:"], images=[[image]])
    name_of = model.language.to_single_str_token
    figure = Figure(figsize=(15, 8), layout="constrained")
    grid = figure.add_gridspec(2, 5)
    picture(Image.open(image), figure.add_subplot(grid[0, 0]), caption="what colour\nis the circle?")
    lens_table(logit_lens(model, batch, final_norm=True), name_of, figure.add_subplot(grid[0, 1:3]), k=3)
    lens_table(tuned_lens(model, batch, lens), name_of, figure.add_subplot(grid[0, 3:]), k=3)
    token = int(model.tokenizer_of("language")(" red", add_special_tokens=False).input_ids[0])
    at_patches = logit_lens(model, batch, final_norm=True, position="image", tokens=[token])
    lens_maps(at_patches, 0, figure.add_subplot(grid[1, :]))
    figure.savefig(args.out, dpi=100)
    print(args.out)
    return args.out


if __name__ == "__main__":
    main()
