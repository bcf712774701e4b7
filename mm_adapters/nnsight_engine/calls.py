"""The calls of a traced model: arguments by name, raw inputs prepared, several invokes as one call."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from nnsight.modeling import processing
from torch import Tensor

from mm_adapters.inputs.call_names import RAW, Call
from mm_adapters.inputs.images import opened
from mm_adapters.inputs.padding import counts_padding, is_encoder_decoder
from mm_adapters.nnsight_engine.call_arguments import by_name, is_token_ids
from mm_adapters.nnsight_engine.invokes import combine, combine_prompts, n_prompts
from mm_adapters.nnsight_engine.pipe_inputs import joined
from mm_adapters.nnsight_engine.text_rows import Padding, as_rows, with_positions
from mm_adapters.nnsight_engine.tokenized import OPTIONS, is_tokenized, tokenized
from mm_adapters.runs.base_model import BaseModel

# What this package's own functions call, by their name.
_CALLS: dict[str, Call] = {"_plain": "forward", "_forward": "forward", "_generate": "generate"}
_OF_THE_TRACE = ("differentiable",)
# What is given to a whole pipeline of transformers, which prepares it.
_PIPED = {"pipe", "pipe_options"}


class CallsModel(BaseModel):
    """A mixin for an nnsight model that is called with its own arguments, or with raw text and images."""

    dtype: Any

    def named(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """One call's arguments by name, raw text and images as they are."""
        arguments = self._named(inputs, kwargs)
        return arguments if self.kind == "diffusion" else as_rows(arguments, self._padding())

    def _named(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not inputs:
            return dict(kwargs)
        processor = getattr(self._inputs, "processor", None) or getattr(self._inputs, "tokenizer", None)
        return by_name(self.kind, self._takes(), processor, inputs, kwargs)

    def _padding(self) -> Padding:
        """How this model's texts are made one batch."""
        tokenizer = getattr(self._inputs, "tokenizer", None)
        config = getattr(self.wrapped, "config", None)
        token = getattr(tokenizer, "pad_token_id", None)
        token = getattr(config, "pad_token_id", None) if token is None else token
        if token is None and tokenizer is None:
            token = 0  # Under the mask it is read by nothing.
        left = self.kind != "contrastive" and getattr(tokenizer, "padding_side", "right") == "left"
        targets = Padding.targets
        if is_encoder_decoder(self.wrapped):
            targets = targets | {"labels"}
        return Padding(token, left, targets, left and counts_padding(self.wrapped, self.sitemap))

    def arguments(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """One call's arguments by name, with raw text and images prepared."""
        if _PIPED & kwargs.keys():
            return kwargs
        return self.call_arguments(tokenized(self._inputs, self.named(inputs, kwargs)))

    def check_traced(self, fn: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Passes if these are arguments of what a trace runs, as far as they go; of others' functions any.

        Raises: InputError for a name that the call does not take, with the nearest; for a value that means
        nothing.
        """
        call = _CALLS.get(getattr(fn, "__name__", ""))
        # The class that stands for a task is known when the weights are read.
        of_a_task = self.kind == "diffusion" and getattr(self, "automodel", None) is not None
        if call is not None and not (of_a_task and self.is_on_meta):
            arguments = self.named(inputs, kwargs)
            beside = _OF_THE_TRACE
            if getattr(fn, "__name__", "") == "_forward" and is_tokenized(arguments):
                beside += OPTIONS
            self.check_call({k: v for k, v in arguments.items() if k not in beside}, call)

    def _for_another_machine(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments with pictures for paths, and tensors on the CPU."""
        out = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        if out.get("images") is not None:
            out["images"] = opened(out["images"])
        return out

    def _one_step(self) -> dict[str, int]:
        """A pipeline's own arguments for one step; one of several loops has several."""
        return {name: 1 for name in self._takes() if name.endswith("num_inference_steps")}

    def _takes(self) -> list[str]:
        """The names of the wrapped model's or pipeline's arguments, in its order."""
        function = self.wrapped.__call__ if self.kind == "diffusion" else type(self.wrapped).forward
        return [name for name in inspect.signature(function).parameters if name != "self"]

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        if kwargs.get("pipe") is not None or (self.kind == "diffusion" and inputs):
            return 1
        if inputs:
            return max(1, processing.batch_size(inputs, kwargs))
        if any(kwargs.get(k) is not None for k in RAW):
            return 1
        if self.kind == "diffusion":
            return n_prompts(kwargs, by_text="prompt" in self._takes())
        return int(any(isinstance(v, Tensor) or is_token_ids(v) for v in kwargs.values()))

    def _batch(self, invokes: list[Any], fn: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        calls = [self._in_dtype(arguments) for _, arguments in invokes]
        if calls and all("pipe" in call for call in calls):
            return (), {"pipe": joined([call["pipe"] for call in calls])}
        if self.kind == "diffusion" and len(calls) > 1:
            return (), combine_prompts(calls)
        call = combine(calls, self._padding()) if len(calls) > 1 else dict(calls[0]) if calls else {}
        # A run is given what it is given; a generation counts from the mask by itself.
        told = self.kind != "diffusion" and getattr(fn, "__name__", "") == "_forward"
        return (), with_positions(call, self._padding()) if told else call

    def _in_dtype(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Pixels in the dtype of the weights, which a sandbox that prepared them does not know."""
        floats = [k for k, v in arguments.items() if isinstance(v, Tensor) and v.dtype == torch.float32]
        if not floats or self.kind == "diffusion" or (dtype := self.dtype) == torch.float32:
            return arguments
        return arguments | {k: arguments[k].to(dtype) for k in floats}
