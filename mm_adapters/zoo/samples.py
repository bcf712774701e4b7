"""The zoo's sample pictures: `python -m mm_adapters.zoo.samples [FOLDER]` draws them again.

They are larger than the models' input, so that resizing is part of using them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from mm_adapters.zoo.world import Scene, by_hand, render, thing

SIZE_PX = 256

SAMPLES: dict[str, Scene] = {
    "red_circle": by_hand("white", thing("circle", "red")),
    "blue_square": by_hand("gray", thing("square", "blue")),
    "green_triangle": by_hand("white", thing("triangle", "green", position="top left")),
    "yellow_star": by_hand("black", thing("star", "yellow", position="right")),
    "small_purple_heart": by_hand("white", thing("heart", "purple", size="small", position="bottom left")),
    "striped_cyan_diamond": by_hand("brown", thing("diamond", "cyan", texture="striped")),
    "dotted_orange_ring": by_hand("black", thing("ring", "orange", texture="dotted")),
    "red_circle_left_of_blue_square": by_hand(
        "white", thing("circle", "red", position="left"), thing("square", "blue", position="right")
    ),
    "blue_circle_left_of_red_square": by_hand(
        "white", thing("circle", "blue", position="left"), thing("square", "red", position="right")
    ),
    "green_triangle_above_yellow_star": by_hand(
        "gray", thing("triangle", "green", position="top"), thing("star", "yellow", position="bottom")
    ),
    "pink_heart_right_of_cyan_ring": by_hand(
        "black", thing("heart", "pink", position="right"), thing("ring", "cyan", position="left")
    ),
    "three_red_squares": by_hand(
        "white",
        *(thing("square", "red", size="small", position=p) for p in ("top left", "middle", "bottom right")),
    ),
}


def main(folder: Annotated[Path, typer.Argument()] = Path(__file__).parent / "samples") -> None:
    """Draws the sample pictures into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in SAMPLES.items():
        Image.fromarray(render(scene, SIZE_PX)).save(folder / f"{name}.png")
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
