"""Tiny inputs for one method and one family: what the rows of the table call the methods with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from methods_multimodal.core.outputs import contrast_of
from methods_multimodal.cross_attention import Case, colour
from tests.methods.contract import processors
from tests.methods.contract.families import TEXT_INPUTS, Family
from tests.methods.contract.processors import first_row


@dataclass(frozen=True)
class Given:
    """Inputs of one family, and a folder that is empty."""

    family: Family
    model: Any
    folder: Path
    width: int
    ready: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The model's own arguments, both rows."""
        return self.family.inputs

    @property
    def first(self) -> dict[str, Any]:
        """The model's own arguments, the first row alone."""
        return first_row(self.inputs)

    @property
    def pixels(self) -> dict[str, Tensor]:
        """The arguments that are of images."""
        return {k: v for k, v in self.inputs.items() if k not in TEXT_INPUTS}

    @property
    def pictures(self) -> list[Image.Image]:
        """Two raw pictures."""
        return processors.pictures()

    texts = processors.TEXTS
    question = processors.QUESTION

    @property
    def tower(self) -> str:
        """The tower that a user would look at: language, vision or text, the first of them there is."""
        return next((t for t in ("language", "vision", "text") if t in self.model.towers), "vision")

    @cached_property
    def corrupted(self) -> dict[str, Any]:
        """The inputs with the images (of a text tower, the texts) of the rows exchanged."""
        of_texts = all(k in TEXT_INPUTS for k in self.inputs)
        return {
            k: v.flip(0) if isinstance(v, Tensor) and (v.is_floating_point() or of_texts) else v
            for k, v in self.inputs.items()
        }

    def metric(self, output: Any) -> Tensor:
        """One number a row: the last of what an edit moves."""
        if self.model.kind == "contrastive" and "vision" in self.model.towers:
            return contrast_of(output).logits[:, -1]
        values = self.family.case.head(output)
        # A loss is the batch's.
        return values.flatten(1)[:, -1] if values.ndim > 1 else values.expand(len(output.image_embeds))

    def layout(self, tower: str) -> Any:
        """What each position of one tower is, in the first row."""
        view = self.model.check_tower(tower)
        layout = self.model.layout(**self.first).get(tower)
        return view.patch_layout(self.first[view.input_name]) if layout is None else layout

    @property
    def patched(self) -> tuple[Any, ...]:
        """The clean inputs, the corrupted ones and the metric of a patching."""
        return self.inputs, self.corrupted, self.metric

    @property
    def first_layer(self) -> dict[str, Any]:
        """Where to patch: the tower's first layer."""
        return {"tower": self.tower, "layers": [0]}

    @property
    def site(self) -> str:
        """The output of a layer's MLP."""
        return f"{self.tower}.blocks.{{}}.hook_mlp_out"

    @property
    def is_tiled(self) -> bool:
        """Whether the first row's image, or images, come on several grids."""
        layout = self.layout(self.tower)
        images = {i for i in layout.image_index[0] if i is not None}
        return layout.grid is None or len(images) > 1 or len(set(layout.tiles[0]) - {None}) > 1

    def directions(self, n: int = 3) -> Tensor:
        """Unit vectors as wide as the vision tower's summary, in place of embedded texts."""
        rows = torch.randn(n, self.width, generator=torch.Generator().manual_seed(4))
        return torch.nn.functional.normalize(rows, dim=1)

    @property
    def drawn_size(self) -> Tensor:
        """Two pictures as pixels in 0..1, of the size that the pipelines draw."""
        return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))

    # -- of pipelines ------------------------------------------------------------------------------

    prompt = "a cat"

    def options(self, rows: int = 1) -> dict[str, Any]:
        """What the pipeline takes beside the prompts and the seeds, for so many rows."""
        if self.family.name == "instruct_pix2pix":  # Which repeats one picture itself.
            rows = 1
        left_out = ("prompt", "seed", "true_cfg_scale", "output_type")
        given = {k: v for k, v in self.inputs.items() if k not in left_out}
        if given.get("negative_prompt") is not None:  # One for each row.
            del given["negative_prompt"]
        return {k: v[:1].repeat_interleave(rows, 0) if isinstance(v, Tensor) else v for k, v in given.items()}

    def sizes(self, rows: int = 1) -> dict[str, Any]:
        """The options without the number of steps, for methods that say it themselves."""
        return {k: v for k, v in self.options(rows).items() if k != "num_inference_steps"}

    @property
    def drawing(self) -> dict[str, Any]:
        """The arguments with which one picture is drawn, by whatever the pipeline draws from."""
        prompt = {"prompt": self.prompt} if "prompt" in self.inputs else {}
        return {**self.options(), **prompt, "seed": 0, "output_type": "pt"}

    @property
    def cases(self) -> list[Case]:
        """One prompt, and the other it is compared with."""
        return [Case("a cat", "cat", "a dog", "dog")]

    redness = staticmethod(colour((1.0, 0.0, 0.0)))

    @property
    def latents(self) -> Tensor:
        """One latent, as the pipeline's autoencoder takes it."""
        sampling = self.model.record.sampling.get("denoiser")
        shape = (1, 4, 16) if sampling is not None and sampling.packed else (1, 4, 4, 4)
        if "vae" not in self.model.towers:
            shape = (1, 3, 4, 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(7))
