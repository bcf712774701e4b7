"""What the models of both engines say of what they wrap: its kind, its sites, its raw inputs, its layout."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mm_adapters._errors import InputError, MetaDeviceError
from mm_adapters.inputs.call_names import RAW, refuse_unknown
from mm_adapters.inputs.from_model import own_tokenizer
from mm_adapters.inputs.texts import as_texts
from mm_adapters.layouts.of_model import layouts
from mm_adapters.layouts.of_prompt import prompt_layouts
from mm_adapters.records.spec import Guidance, Kind, ModelRecord, Site
from mm_adapters.runs.call_checks import CallChecks
from mm_adapters.runs.turns import Turns
from mm_adapters.sites.not_in_checkpoint import random_weights
from mm_adapters.sites.site_map import SiteMap, SiteTable
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tokens.by_part import Layouts
from mm_adapters.tokens.layout import TokenLayout

if TYPE_CHECKING:
    from mm_adapters.inputs.prepare import Inputs


class BaseModel(CallChecks):
    """A module or pipeline, with its map of sites and what prepares its inputs.

    An engine's model is one of these, and has `wrapped`, `_inputs`, `sitemap`, `device` and `dtype`.
    """

    wrapped: Any
    sitemap: SiteMap
    _inputs: Inputs | None
    _loaded_as: str | None = None
    _turns: Turns

    @property
    def name(self) -> str:
        """What it was loaded as ("tiny-clip"), else its family."""
        return self._loaded_as or self.sitemap.family

    @property
    def kind(self) -> Kind:
        """ "contrastive", "vlm", "diffusion" or "tower"."""
        return self.sitemap.model_record.kind

    @property
    def record(self) -> ModelRecord:
        """What its family says of it."""
        return self.sitemap.model_record

    @property
    def towers(self) -> Mapping[str, TowerView]:
        """Its towers by name, in the order they run: modules, weights, summaries, patch layouts."""
        self.follow()
        return self.sitemap.towers

    @property
    def preparer(self) -> Inputs | None:
        """What makes raw texts and images the model's own arguments; None if it came without."""
        return self._inputs

    @property
    def tower_names(self) -> list[str]:
        """The towers' names, in the order they run."""
        return list(self.sitemap.towers)

    @property
    def random_weights(self) -> tuple[str, ...]:
        """The weights that the checkpoint lacked, loaded with `strict=False`: they are random."""
        return random_weights(self.wrapped)

    @property
    def is_on_meta(self) -> bool:
        """Whether the weights have no values."""
        device = self._device()
        return device is not None and device.type == "meta"

    def sites(self, pattern: str = "*") -> SiteTable:
        """The sites whose names match a glob, with axes; and what is absent there, with the reason."""
        self.follow()
        return SiteTable(self.sitemap.find(pattern))

    def check_site(self, name: str) -> Site:
        """The site of this name. Raises: MissingSiteError with the reason, or the nearest names."""
        self.follow()
        return self.sitemap.check(name)

    def check_tower(self, name: str) -> TowerView:
        """The tower of this name. Raises: MissingSiteError naming those there are."""
        self.follow()
        return self.sitemap.tower(name)

    def loops(self) -> Mapping[str, Guidance | None]:
        """The towers that sampling loops call, each with how it is guided; none outside pipelines."""
        self.follow()
        return self.sitemap.loops

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No other thread runs the model inside, and its sites are those of the modules that it has.

        Inside another run of this thread, what that has on the model is set aside.

        Raises: ModelBusyError if another thread has the model and does not go on.
        """
        with self._turns.taken() as is_first:
            if is_first:
                self.follow()
            yield

    def follow(self) -> None:
        """Maps the sites again if modules of the model were put in place of others."""
        raise NotImplementedError

    def prepare(self, *, text: Any = None, images: Any = None, **unknown: Any) -> dict[str, Any]:
        """Raw text and images as the wrapped model's own arguments, on its device, in its dtype.

        Raises: InputError for what cannot be prepared, or is neither.
        """
        refuse_unknown("prepare", unknown, RAW)
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
        self.call_names().check(prepared)
        texts = None
        if isinstance(text, Tensor):  # open_clip's argument of tokens has this name.
            prepared, text = prepared | {"text": text}, None
        if self.sitemap.model_record.loop is not None and prepared.get("prompt") is not None:
            if text is not None:
                raise InputError("text= and prompt= were both given, and one would be left out. Pass one.")
            prepared = dict(prepared)
            text = prepared.pop("prompt")
        if text is not None or images is not None:
            if self._inputs is not None and text is not None:
                texts = self._inputs.prompts(text, images)
            if self.sitemap.model_record.loop is None:
                prepared = prepared | self.prepare(text=text, images=images)
        if self.sitemap.model_record.loop is not None:
            prompts = texts if text is None or texts else as_texts(text)
            if prompts and self._inputs is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # A run says what it cuts.
                    self._inputs.prepare(text=prompts)  # Raises InputError for what no run would take.
            by_tower = prompt_layouts(self.wrapped, self.sitemap, self.tokenizer_of, prompts or [], prepared)
            return Layouts(by_tower)
        return layouts(self.wrapped, self.sitemap, self.tokenizer_of, prepared, texts)

    def row_positions(
        self, inputs: Mapping[str, Any], position: int = -1, tower: str = "language"
    ) -> Int[Tensor, " row"]:
        """Where one position of each row stands in a text or language tower's padded sequence.

        -1 is the last position that the row's attention mask has, -2 the one before it, wherever the
        padding is. From 0 on it is the position itself, which may be padding. `inputs` are raw or prepared.

        Raises: InputError if a row has no such position, or the inputs have no tokens for this tower.
        """
        raw = {name: inputs[name] for name in ("text", "images") if inputs.get(name) is not None}
        if isinstance(raw.get("text"), Tensor):  # open_clip's argument of tokens has this name.
            del raw["text"]
        ready = {**inputs, **(self.prepare(**raw) if raw else {})}
        return self.check_tower(tower).row_positions(ready, position)

    def prompt_layout(self, tower: str, texts: list[str]) -> TokenLayout:
        """What each position of a pipeline's prompts is, padded as the pipeline pads them."""
        self.check_tower(tower)
        return self.layout(text=texts)[tower]

    def tokenizer_of(self, tower: str) -> Any:
        """The tokenizer of a text tower, or None."""
        of_pipeline = own_tokenizer(self.wrapped, self.sitemap.towers.get(tower))
        return of_pipeline if of_pipeline is not None else getattr(self._inputs, "tokenizer", None)

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
