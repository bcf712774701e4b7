"""The models' cards: what each is, how it was made, what was measured, what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mm_adapters.zoo import world
from mm_adapters.zoo.clip import SIMPLE_STEPS
from mm_adapters.zoo.drawing import draw, prompts_to_draw
from mm_adapters.zoo.measures import Measure, images_of
from mm_adapters.zoo.sd import N_FIRST, N_TRAINING

_WHAT = {
    "tiny-clip": (
        "A `CLIPModel`: two towers of 4 layers, width 128, 4 heads; images of 64 x 64 in patches "
        "of 8; 32 tokens of text. The tokenizer is byte-level BPE learnt from the world's words; "
        '"triangle", "diamond", "striped", "purple" and "background" are several tokens on purpose.'
    ),
    "tiny-llava": (
        "A `LlavaForConditionalGeneration`: tiny-clip's vision tower as it was before its last three stages "
        "(frozen, its last layer but one, 64 image tokens), a two-layer projector, and a Llama of 4 layers, "
        "width 128, 4 heads, 2 key-value heads. "
        "Ask it in this form and decode greedily:\n\n"
        "```\n<image>\nquestion: what colour is the circle? answer:\n```"
    ),
    "tiny-sd": (
        "A `StableDiffusionPipeline`: an autoencoder from 64 x 64 pixels to 16 x 16 x 4 latents, a "
        "`UNet2DConditionModel` with cross-attention at 16 x 16 and 8 x 8, tiny-clip's text tower as it was "
        "before its last four stages, and DDIM with v-prediction and no signal at the last step."
    ),
}
_DATA = {
    "tiny-clip": (
        "Every image is new: 40 % one object, 40 % two, 20 % two to six alike (in the first "
        f"{SIMPLE_STEPS} steps one only). A caption says a random part of what is true. A caption that is "
        "true of another image is never its negative, and each image also meets its own caption with one "
        "thing changed. Besides the contrastive loss, linear heads (not kept) read from each patch at the "
        "last layer but one what object it lies on; without them the tower learnt colours only in the "
        "time there was. In the last four stages pictures of two objects come in pairs that hold the same "
        "values, one of them swapped between the objects, with captions of one object alone, of both "
        'joined by "and" and of both in relation, their adjectives in any order and their radius any that '
        "the word allows; heads name which values belong together."
    ),
    "tiny-llava": (
        "Every image is new, with six questions: colour, shape, where, how many, is there. Of those "
        "whether there is something that there is not, most ask for the colour of one object in the shape "
        "of another. The projector and the language model are trained, the vision tower is not."
    ),
    "tiny-sd": (
        f"A finite list of {N_TRAINING} images, `mm_adapters.zoo.sd.training_example(i)`. The first "
        f"{N_FIRST}: solid objects, seven in 8 with one object, the others with two. The second stage adds "
        "the others, and meets them three times in four: one or two objects of any texture, captions "
        "short or long, adjectives in any order. The caption is left out one time in ten. The autoencoder "
        "is trained first, on images of the whole world. In the denoiser's loss, the error of the "
        "velocity, places with an object weigh five times as much; linear heads (not kept) also learn to "
        "tell from its features which shape (and, in the second stage, colour) each place will show. "
        "Without them it learnt colours only."
    ),
}
_LIMITS = {
    "tiny-clip": (
        "It knows this world only. Words outside it fall apart into letters and mean nothing to it. It is "
        "least sure of which of two objects stands where, of the shape of small objects, and of shapes in "
        "colours it never saw them in. It never saw three objects that differ, a negation, or a caption "
        "that says two things of unlike objects by number."
    ),
    "tiny-llava": (
        "It knows this world and these forms of question only; it was never asked for a texture or a size, "
        "about three objects that differ, or what is not there. Its chat template holds one question."
    ),
    "tiny-sd": (
        "It draws this world only. Its autoencoder blurs textures away and mixes their two colours into a "
        "third, as the rows of scenes through the autoencoder show: stripes and dots cannot be drawn, and "
        "two objects are told apart only as well as these scenes are. Where a prompt leaves the place open "
        "it may draw an object twice; of two objects it may draw one, or mix them. The second stage was to "
        "bring short prompts to 90 % and those with two objects to 75 %; the rows say how far it came. "
        "Numbers are with 25 steps and guidance 2, which is better than 1, 3 and 5 on prompts of the split "
        "validation."
    ),
}


def write(name: str, folder: Path, measured: list[Measure]) -> None:
    """Writes README.md and its pictures into the model's folder."""
    world_sheet().save(folder / "world.png", optimize=True)
    lines = [f"# {name}", "", _WHAT[name], ""]
    lines += [
        "Trained by this project on a rendered world whose truth is known (`mm_adapters.zoo.world`):",
        "",
    ]
    lines += ["![Scenes of the world](world.png)", ""]
    if name == "tiny-sd":
        contact_sheet(folder).save(folder / "samples.png", optimize=True)
        lines += ["Pictures it draws from prompts (25 steps, guidance 2, none chosen):", ""]
        lines += ["![Drawn pictures with their prompts](samples.png)", ""]
    lines += ["## Data", "", _DATA[name], ""]
    pairs = ", ".join(f"{colour} {shape}" for shape, colour in world.HELD_OUT_PAIRS)
    lines += [f"Never seen in training: {pairs}.", "", "## Training", "", _training(name, folder), ""]
    lines += ["## Measured", "", "On scenes of the split `test` (other seeds than training):", ""]
    lines += ["| what | value | required | samples |", "|---|---|---|---|"]
    lines += [f"| {m.name} | {m.value:.1%} | {m.bound()} | {m.n} |" for m in measured]
    lines += ["", f"By `python -m mm_adapters.zoo.evaluate {name}`.", "", "## Limits", "", _LIMITS[name], ""]
    (folder / "README.md").write_text("\n".join(lines), "utf-8")


def _training(name: str, folder: Path) -> str:
    text = f"`python -m mm_adapters.zoo.train {name}` makes it again from a seed."
    record = folder / "training.json"
    if record.exists():
        history = json.loads(record.read_text("utf-8"))
        for stage, run in history["stages"].items():
            text += f" {stage}: {run['steps_done']} steps in {run['seconds'] / 60:.0f} minutes."
        text += (
            f" Seed {history['seed']}, {history['device']}, {history['threads']} thread(s), shared machine."
        )
        text += f" {history['note']}" if "note" in history else ""
    return text


def world_sheet() -> Image.Image:
    """Scenes of the training split, 4 rows of 8."""
    return _grid(images_of([world.scene(i) for i in range(32)]), None, columns=8, side=96)


def contact_sheet(folder: Path) -> Image.Image:
    """What tiny-sd draws, each picture above its prompt."""
    from mm_adapters.zoo.models_at import load

    texts = [text for _, text in prompts_to_draw(24)]
    pipeline, _ = load(folder, "tiny-sd")
    return _grid(draw(pipeline, texts), texts, columns=6, side=160)


def _grid(images: list[Image.Image], texts: list[str] | None, columns: int, side: int) -> Image.Image:
    gap, line_height = 8, 15
    foot = 3 * line_height if texts else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + foot + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, image in enumerate(images):
        x, y = gap + (i % columns) * (side + gap), gap + (i // columns) * (side + foot + gap)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")
        for number, text in enumerate(_wrap(texts[i], pen, font, side) if texts else []):
            pen.text((x, y + side + 1 + number * line_height), text, fill="black", font=font)
    return sheet


def _wrap(text: str, pen: ImageDraw.ImageDraw, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
