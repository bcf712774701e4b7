"""A pipeline's text encoders: which of its texts each reads, as what, and up to how many tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_adapters.records.spec import ModelRecord

_NO_LIMIT = 10**9  # transformers writes int(1e30) where a tokenizer has no limit.


@dataclass(frozen=True)
class PromptEncoder:
    """One text encoder of a pipeline: the component's name, its tokenizer, and the record of its pipeline."""

    part: str
    tokenizer: Any
    pipeline: Any
    record: ModelRecord

    def text_of(self, arguments: Mapping[str, Any], name: str = "prompt") -> tuple[str, Any]:
        """(argument, texts) of what it is given: text_encoder_2 reads prompt_2, or prompt without one."""
        number = self.part.rpartition("text_encoder")[2]
        own = f"{name}{number}"
        if number and arguments.get(own) is not None:
            return own, arguments[own]
        return name, arguments.get(name)

    def converted(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """The texts as its tokenizer is given them: as `spelt_out`, in the pipeline's template."""
        before, behind = self._around(options)
        return [before + text + behind for text in self.spelt_out(texts, options)]

    def spelt_out(self, texts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        """The texts cleaned as the pipeline cleans them, with each vector of a token of many a token."""
        given = list(texts)
        clean = getattr(self.pipeline, "_text_preprocessing", None)
        if clean is not None:
            given = list(clean(given, clean_caption=bool(self._option("clean_caption", options))))
        spell = getattr(self.pipeline, "maybe_convert_prompt", None)
        if spell is not None and hasattr(self.tokenizer, "added_tokens_encoder"):
            given = list(spell(given, self.tokenizer))
        return given

    def limit(self, options: Mapping[str, Any]) -> int | None:
        """How many tokens of a converted text it reads; None if nothing says it."""
        if self.record.template is not None:
            return self.pipeline.tokenizer_max_length + getattr(self.pipeline, self.record.template[1])
        most = self.record.prompt_length or self._context() or self._option("max_sequence_length", options)
        if most is None:
            length = getattr(self.tokenizer, "model_max_length", None) or _NO_LIMIT
            return length if length < _NO_LIMIT else None
        before, _ = self._around(options)
        # The instruction's own start and end are counted with the text's.
        return most + (len(self.tokenizer(before)["input_ids"]) - 2 if before else 0)

    def _context(self) -> int | None:
        config = getattr(getattr(self.pipeline, self.part), "config", None)
        table = getattr(config, "max_position_embeddings", None)
        if table is None or getattr(config, "rope_parameters", None) is not None:
            return None  # What rotates its positions is cut by the pipeline.
        return min(table, getattr(self.tokenizer, "model_max_length", None) or table)

    def _around(self, options: Mapping[str, Any]) -> tuple[str, str]:
        if self.record.template is not None:
            before, _, behind = getattr(self.pipeline, self.record.template[0]).partition("{}")
            return before, behind
        instruction = self._option("complex_human_instruction", options)
        return ("\n".join(instruction), "") if instruction else ("", "")

    def _option(self, name: str, options: Mapping[str, Any]) -> Any:
        parameter = inspect.signature(type(self.pipeline).__call__).parameters.get(name)
        if parameter is None:
            return None
        return parameter.default if options.get(name) is None else options[name]


def prompt_encoders(pipeline: Any, record: ModelRecord) -> list[PromptEncoder]:
    """The text encoders that a pipeline has, in its order, each with its tokenizer."""
    found = []
    for part in getattr(pipeline, "components", {}):
        if "text_encoder" not in part or getattr(pipeline, part, None) is None:
            continue
        tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"), None)
        if tokenizer is not None:
            found.append(PromptEncoder(part, tokenizer, pipeline, record))
    return found
