"""One call's arguments: checked before anything runs, with raw text and images prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mm_adapters._errors import InputError
from mm_adapters.inputs.call_names import RAW, Call, CallNames, call_names
from mm_adapters.inputs.generation import check_generation
from mm_adapters.inputs.images import to_rgb_list
from mm_adapters.inputs.pipeline_call import check_options, check_output
from mm_adapters.inputs.prompts import check_prompts
from mm_adapters.sites.site_map import SiteMap

if TYPE_CHECKING:
    from mm_adapters.inputs.prepare import Inputs


class CallChecks:
    """A mixin for a model of either engine: what a call of it takes, and its arguments made ready."""

    wrapped: Any
    sitemap: SiteMap
    _inputs: Inputs | None
    prepare: Any

    def call_names(self, call: Call = "forward") -> CallNames:
        """What the wrapped model's forward or generate takes; of a pipeline, its call."""
        known = self.__dict__.setdefault("_names_of", {})
        key = (call, type(self.wrapped))
        if key not in known:
            known[key] = call_names(self.wrapped, self.sitemap, call)
        return known[key]

    def check_call(self, arguments: Mapping[str, Any], call: Call = "forward") -> None:
        """Passes if these are arguments of such a call, as far as they go.

        Raises: InputError for a name that the call does not take, with the nearest; for a value that
        means nothing.
        """
        self.call_names(call).check(arguments)
        if self._is_pipeline:
            with unset_fake_temporarily():
                check_options(self.wrapped, arguments)
                check_output(self.sitemap.model_record.outputs, arguments)
        elif call == "generate":
            check_generation(self.wrapped, arguments)

    def call_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The wrapped model's own arguments: their values checked, and raw text and images prepared.

        Raises: InputError for a value that means nothing, what is given raw and prepared, tensors that the
        model cannot read, and prompts that are cut.
        """
        if self._is_pipeline:
            with unset_fake_temporarily():  # In a scan the arguments are real, and nothing else is.
                check_options(self.wrapped, arguments)
                check_output(self.sitemap.model_record.outputs, arguments)
                return self._pipeline_arguments(dict(arguments))
        own = dict(arguments)
        raw = {k: own.pop(k) for k in RAW if own.get(k) is not None and not _is_own(k, own[k])}
        if self._inputs is None:
            return {**self.prepare(**raw), **own} if raw else own
        reads = self._inputs.reads
        for name, key in zip(RAW, (reads.text_key, reads.image_key), strict=True):
            if name in raw and key != name and own.get(key) is not None:
                raise InputError(f"{name}= and {key}= were both given, and one would be left out. Pass one.")
        out = {**self.prepare(**raw), **own} if raw else own
        if own or not raw:
            with unset_fake_temporarily():
                reads.check(out)
        return out

    @property
    def _is_pipeline(self) -> bool:
        return self.sitemap.model_record.kind == "diffusion"

    def _pipeline_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        image_key = "image" if "image" in self.call_names().own else ""
        for name, key in (("text", "prompt"), ("images", image_key)):
            if name not in arguments or name in self.call_names().own:
                continue
            value = arguments.pop(name)
            if value is None:
                continue
            if not key or key not in self.call_names().own:
                what = "makes pictures from text alone" if name == "images" else "reads no text"
                raise InputError(f"{type(self.wrapped).__name__} {what}. Leave {name} out.")
            if arguments.get(key) is not None:
                raise InputError(f"{name}= and {key}= were both given, and one would be left out. Pass one.")
            arguments[key] = to_rgb_list(value) if name == "images" else value
        check_prompts(self.wrapped, self.sitemap.model_record, arguments)
        return arguments


def _is_own(name: str, value: Any) -> bool:
    # open_clip's own argument is called text too, and is a tensor of tokens.
    return name == "text" and isinstance(value, Tensor)
