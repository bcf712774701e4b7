"""What the models of both engines say of what they wrap: its kind, its sites, its raw inputs, its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mm_adapters._errors import InputError, MetaDeviceError
from mm_adapters.inputs.from_model import own_tokenizer
from mm_adapters.inputs.texts import as_texts
from mm_adapters.sites.site_map import SiteMap, SiteTable
from mm_adapters.tokens.layouts import Layouts
from mm_adapters.tokens.of_model import layouts
from mm_adapters.tokens.of_prompt import prompt_layouts

if TYPE_CHECKING:
    from mm_adapters.inputs.prepare import Inputs


class BaseModel:
    """A module or pipeline, with its map of sites and what prepares its inputs.

    An engine's model is one of these, and has `wrapped`, `_inputs`, `sitemap`, `device` and `dtype`.
    """

    wrapped: Any
    sitemap: SiteMap
    _inputs: Inputs | None

    @property
    def kind(self) -> str:
        """ "contrastive", "vlm", "diffusion" or "tower"."""
        return self.sitemap.model_record.kind

    @property
    def tower_names(self) -> list[str]:
        """The towers' names, in the order they run."""
        return list(self.sitemap.towers)

    @property
    def is_on_meta(self) -> bool:
        """Whether the weights have no values."""
        device = self._device()
        return device is not None and device.type == "meta"

    def sites(self, pattern: str = "*") -> SiteTable:
        """The sites whose names match a glob, with axes; and what is absent there, with the reason."""
        return SiteTable(self.sitemap.find(pattern))

    def prepare(self, *, text: Any = None, images: Any = None) -> dict[str, Any]:
        """Raw text and images as the wrapped model's own arguments, on its device, in its dtype."""
        if self._inputs is None:
            raise InputError(
                "This model came without a processor, so it cannot take raw text or images. "
                "Pass one: mm_adapters.wrap(model, processor=...), or give the model's own arguments."
            )
        with unset_fake_temporarily():  # In a scan the inputs are real, so that they can be made.
            ready = self._inputs.prepare(text=text, images=images)
            return {k: self._placed(v) if isinstance(v, Tensor) else v for k, v in ready.items()}

    def layout(self, *, text: Any = None, images: Any = None, **prepared: Any) -> Layouts:
        """What each position of each tower is: class, patch (row, column), word, image, padding.

        Takes raw text and images, or the wrapped model's own tensors. For a pipeline, the prompt's, and
        of a denoiser where text and image attend together: give `height`, `width` and
        `max_sequence_length` as to the pipeline. With an IP-Adapter and its `ip_adapter_image`, also what
        the "image_prompt" is made of.
        """
        texts = None
        if text is not None or images is not None:
            if self._inputs is not None and text is not None:
                texts = self._inputs.prompts(text, images)
            if self.sitemap.model_record.loop is None:
                prepared = self.prepare(text=text, images=images)
        if self.sitemap.model_record.loop is not None:
            given = texts if text is None or texts else as_texts(text)
            found = prompt_layouts(self.wrapped, self.sitemap, self.tokenizer_of, given or [], prepared)
            return Layouts(found)
        return layouts(self.wrapped, self.sitemap, self.tokenizer_of, prepared, texts)

    def tokenizer_of(self, tower: str) -> Any:
        """The tokenizer of a text tower, or None."""
        own = own_tokenizer(self.wrapped, self.sitemap.towers.get(tower))
        return own if own is not None else getattr(self._inputs, "tokenizer", None)

    def check_ready(self) -> None:
        """Raises: MetaDeviceError if the weights have no values."""
        if self.is_on_meta:
            raise MetaDeviceError(
                "This model is on the meta device: its sites can be listed, but it has no weights to run. "
                "Load it without device='meta'."
            )

    def _placed(self, x: Tensor) -> Tensor:
        # On the meta device there is nothing to compute with, but a layout to make or a job to send.
        device = torch.device("cpu") if self.is_on_meta else self._device()
        return x.to(device, self.dtype if x.is_floating_point() else None)  # type: ignore[attr-defined]

    def _device(self) -> torch.device | None:
        return self.device  # type: ignore[attr-defined]
