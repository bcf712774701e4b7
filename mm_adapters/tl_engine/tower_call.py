"""How a tower is called: HookedTransformer's forward, over a tower of a model that is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss
from transformer_lens.utilities.tokenize_utils import get_attention_mask

from mm_adapters._errors import InputError
from mm_adapters.inputs.call_names import tower_names
from mm_adapters.sites.site_map import resolve
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tl_engine.hook_point import SitePoint
from mm_adapters.tl_engine.key_value_cache import key_value_cache
from mm_adapters.tl_engine.part_run import layer_number, starting, stopping

RETURN_TYPES = ("logits", "loss", "both", "embeds", "module", None)


class LogitsAndLoss(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos token"]
    loss: Tensor


class TowerCall:
    """Calling a tower: text, tokens, pixels or a stream in; logits, a summary, a loss or a stream out."""

    cfg: Any
    name: str
    tokenizer: Any
    _root: Any
    _class_directions: Tensor | None
    to_tokens: Callable[..., Tensor]
    check_no_export: Callable[[], None]
    pads_left: Callable[[str | None], bool]

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        shortformer_pos_embed: Any = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the tower alone.

        Args:
            input: A text, a list of texts, tokens [batch, pos] (or [pos]) or pixels, whichever it takes; with
                `start_at_layer` the stream that enters that layer, [batch, pos, d_model].
            return_type: "logits" as the class docstring says, "embeds" for the summary, "loss" or "both" for
                a language tower's next-token loss, "module" for the module's own output, None for nothing.
            loss_per_token: Whether the loss is [batch, pos - 1], zero at padding, and not its mean.
            prepend_bos: Whether texts get the start token; None: as `cfg.default_prepend_bos`.
            padding_side: Where shorter texts are padded, "left" or "right"; None: the tokenizer's.
            start_at_layer: Runs from this layer on; counted from the end if negative.
            tokens: With `start_at_layer`, the tokens that a loss is of. A text tower that reads its summary
                at its end token needs them too.
            shortformer_pos_embed: No model here has one.
            attention_mask: 1 where a position is attended to, 0 at padding, which no loss counts. Made for
                texts that differ in length, and for tokens that begin with padding on the left.
            stop_at_layer: Returns the stream that enters this layer, and runs no more.
            past_kv_cache: TransformerLens' key-value cache: goes on from it and adds to it. Keys are those
                that the model keeps, after any rotation.
            kwargs: What the model's own forward takes besides (`pixel_values`, for a language tower that
                looks).

        Raises: InputError for what the tower does not take.
        """
        self.check_no_export()
        if return_type not in RETURN_TYPES:
            known = ", ".join(map(repr, RETURN_TYPES))
            raise InputError(f"return_type={return_type!r} is none of {known}.")
        if shortformer_pos_embed is not None:
            raise InputError("shortformer_pos_embed: no model here adds its positions inside its attention.")
        with self._root.turn():
            self._root.check_ready()
            call = _Call(self, {**self.__dict__["_given"], **kwargs}, attention_mask)
            if start_at_layer is None:
                call.read(input, prepend_bos, padding_side, given=past_kv_cache is not None)
            else:
                call.start(input, tokens, start_at_layer, past_kv_cache is not None)
            return call.run(return_type, loss_per_token, stop_at_layer, past_kv_cache)

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos token"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """The cross-entropy of each token given those before it: its mean, or [batch, pos - 1].

        Where `attention_mask` is 0 a position neither predicts nor is predicted.
        """
        mask = None if attention_mask is None else attention_mask.to(logits.device)
        return lm_cross_entropy_loss(logits.float(), tokens.to(logits.device), mask, per_token)

    def attended_tokens(
        self,
        tokens: Int[Tensor, "batch pos"],
        texts: Sequence[str] | None = None,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        *,
        goes_on: bool = False,
    ) -> Int[Tensor, "batch pos"] | None:
        """1 where tokens are no padding; None if all are none.

        Of texts all their padding is known; of tokens, what they begin with where texts are padded left, and
        if another call `goes_on` from them, what they end with where texts are padded right.
        """
        mounted: TowerView = self.__dict__["_mounted"]
        if mounted.role != "language":
            return None
        if texts is not None:
            lengths = [self.to_tokens(t, prepend_bos=prepend_bos).shape[1] for t in texts]
            places = torch.arange(tokens.shape[1], device=tokens.device)
            places = places.flip(0) if self.pads_left(padding_side) else places
            mask = places.lt(torch.tensor(lengths, device=tokens.device)[:, None]).long()
        elif self.tokenizer is None or self.tokenizer.pad_token_id is None:
            return None
        else:
            left = self.pads_left(padding_side)
            if not left and not goes_on:
                return None
            has_bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            mask = get_attention_mask(self.tokenizer, tokens, has_bos, "left" if left else "right")
        return None if bool(mask.all()) else mask

    def _point(self, local: str) -> SitePoint:
        return self._root.points.by_name[self._root.sitemap.check(f"{self.name}.{local}").name]


class _Call:
    """One call of a tower: what it is run with, and what comes out."""

    def __init__(self, tower: Any, given: dict[str, Any], attention_mask: Tensor | None) -> None:
        self.tower = tower
        self.mounted: TowerView = tower.__dict__["_mounted"]
        self.given = given
        self.mask = attention_mask
        self.tokens: Tensor | None = None
        self.stream: tuple[int, Tensor] | None = None
        self.value: Any = None
        run = self.mounted.mount.run
        root = tower._root
        self.target = self.mounted.module if run is None else resolve(root.wrapped, run)
        self.names = (
            root.call_names()
            if self.target is root.wrapped
            else tower_names(f"The {self.mounted.name} tower", self.target)
        )

    def read(self, input: Any, prepend_bos: bool | None, padding_side: str | None, *, given: bool) -> None:
        """Text, tokens or pixels; `given` says that positions came before."""
        texts = [input] if isinstance(input, str) else input
        if isinstance(texts, list) and texts and isinstance(texts[0], str):
            input = self.tower.to_tokens(texts, prepend_bos=prepend_bos, padding_side=padding_side)
        else:
            texts = None
        if self.mounted.role in ("text", "language") and isinstance(input, Tensor):
            input = (input if input.ndim != 1 else input[None]).to(self.tower._root.device)
            self.tokens = input
            if self.mask is None and (len(texts or ()) != 1 or given):
                self.mask = self.tower.attended_tokens(input, texts, prepend_bos, padding_side, goes_on=given)
                if self.mask is None and given:
                    self.mask = torch.ones_like(input)
        self.value = input

    def start(self, stream: Any, tokens: Tensor | None, layer: int, given: bool) -> None:
        """The stream that enters a layer."""
        mounted = self.mounted
        layer = layer_number(mounted, layer, "start_at_layer")
        if not (isinstance(stream, Tensor) and stream.ndim == 3 and stream.is_floating_point()):
            raise InputError("start_at_layer takes the stream that enters the layer, [batch, pos, d_model].")
        if given and layer:
            raise InputError(
                "past_kv_cache goes with start_at_layer=0 only: earlier layers add nothing to it."
            )
        if mounted.role == "text" and mounted.pool in ("end", "last") and tokens is None:
            raise InputError(f"The {mounted.name} tower reads its summary at its end token: pass tokens=.")
        self.tokens, self.stream = tokens, (layer, stream)
        if mounted.role == "text" and tokens is not None:
            self.value = tokens
        elif mounted.role in ("text", "language"):
            shape, device = stream.shape[:2], self.tower._root.device
            self.value = torch.full(shape, _filler(self.tower), device=device)
            if given and self.mask is None:
                self.mask = torch.ones_like(self.value)
        else:
            self.value = _blank(self.mounted, len(stream), self.tower._root)
        self.given.pop("pixel_values", None)

    def run(self, return_type: str | None, loss_per_token: bool, stop: int | None, cache: Any) -> Any:
        tower, mounted = self.tower, self.mounted
        stop = None if stop is None else layer_number(mounted, stop, "stop_at_layer")
        first = self.stream[0] if self.stream else 0
        if stop is not None and stop <= first and self.stream:
            return self.stream[1]
        if return_type in ("loss", "both") and stop is None:
            if mounted.role != "language":
                raise InputError(f"The {mounted.name} tower predicts no words, so it has no loss.")
            if self.tokens is None:
                raise InputError("A loss is of tokens: with start_at_layer, pass tokens=.")
        arguments = dict(self.given)
        if self.mask is not None:
            if mounted.role not in ("text", "language"):
                raise InputError(
                    f"The {mounted.name} tower takes no attention_mask: it attends to everything."
                )
            arguments["attention_mask"] = self.mask
        name = mounted.input_name
        if mounted.record.gives and name in arguments:
            raise InputError(
                f"{name} was given twice: as what the tower is run on, and as {name}=. Give it once."
            )
        self.names.check(arguments)
        with ExitStack() as stack:
            if cache is not None:
                arguments |= stack.enter_context(key_value_cache(cache, self.names, mounted, self.mask))
            if self.stream:
                stack.enter_context(starting(mounted, tower._root.points.by_name, *self.stream))
            stopped = stack.enter_context(stopping(tower._point, stop)) if stop is not None else []
            stack.enter_context(tower._root.running())
            output = (
                self.target(**{name: self.value}, **arguments)
                if mounted.record.gives
                else self.target(self.value, **arguments)
            )
        return stopped[0] if stopped else self._returned(output, return_type, loss_per_token)

    def _returned(self, output: Any, return_type: str | None, loss_per_token: bool) -> Any:
        tower = self.tower
        if return_type is None:
            return None
        if return_type == "module":
            return output
        summary = self.mounted.pooled_output(output)
        if return_type in ("loss", "both"):
            assert self.tokens is not None
            # Of a cache's run the mask also has the positions before.
            mask = None if self.mask is None else self.mask[:, -self.tokens.shape[1] :]
            loss = tower.loss_fn(summary, self.tokens, mask, loss_per_token)
            return loss if return_type == "loss" else LogitsAndLoss(summary, loss)
        if return_type == "logits" and tower._class_directions is not None:
            return summary @ tower._class_directions.to(summary).T
        return summary


def _filler(tower: Any) -> int:
    """A token that is neither padding nor an image's place."""
    config = getattr(tower._root.wrapped, "config", None)
    pad = getattr(tower.tokenizer, "pad_token_id", None)
    special = {pad, *(getattr(config, n, None) for n in ("image_token_id", "video_token_id", "pad_token_id"))}
    return next(i for i in range(len(special) + 1) if i not in special)


def _blank(mounted: TowerView, n_rows: int, root: Any) -> Tensor:
    """Pixels of the size that the tower is built for."""
    size = getattr(getattr(mounted.module, "config", None), "image_size", None)
    if not isinstance(size, int | list | tuple) or mounted.input_name != "pixel_values":
        raise InputError(
            f"The {mounted.name} tower does not say the size of its images: start_at_layer needs it."
        )
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(mounted.module.config, "num_channels", 3)
    return torch.zeros(n_rows, channels, height, width, device=root.device, dtype=root.dtype)
