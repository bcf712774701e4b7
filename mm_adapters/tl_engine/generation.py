"""TransformerLens' `generate` and `generate_stream` of a language tower, by the model's own generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mm_adapters._errors import HostAssertionError, InputError
from mm_adapters.inputs.cache_argument import OLD, cache_name
from mm_adapters.tl_engine.generation_checks import (
    check_fill,
    check_mask,
    check_padding_side,
    criteria_of,
    stop_texts,
)

RETURN_TYPES = ("input", "str", "tokens", "embeds")


@dataclass
class _Prompt:
    """What is continued: tokens or embeddings, [batch, pos, ...], and which of it is no padding."""

    name: str
    value: Tensor
    mask: Tensor | None
    were_texts: bool
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        mask = {} if self.mask is None else {"attention_mask": self.mask}
        return {self.name: self.value, **mask, **self.more}


class TowerGeneration:
    """Continuing a text, with hooks active at each step."""

    cfg: Any
    name: str
    tokenizer: Any
    embed: Any
    _root: Any
    to_tokens: Callable[..., Tensor]
    attended_tokens: Callable[..., Tensor | None]
    run_with_cache: Callable[..., Any]

    def generate(
        self,
        input: str | Sequence[str] | Tensor = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
        output_logits: bool = False,
        return_cache: bool = False,
        return_input_tokens: bool = False,
        names_filter: Any = None,
        device: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Any = None,
        attention_mask: Tensor | None = None,
        return_dict_in_generate: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues texts, tokens [batch, pos] or embeddings [batch, pos, d_model].

        Sampling is torch's, by its global seed. The library's own settings of the checkpoint (a repetition
        penalty, forced tokens) are not used, as in TransformerLens.

        Args:
            input: What is continued. Texts of several lengths are padded on the left.
            max_new_tokens: At most so many tokens more.
            stop_at_eos: Whether a row ends at an end token; it is filled with it then.
            eos_token_id: The end token, or several; None: the tokenizer's, or `cfg.eos_token_id` without one.
            do_sample: Draws each token; False takes the most likely.
            top_k: Draws among the k most likely.
            top_p: Draws among the most likely that have this probability together.
            temperature: Divides the logits; 0 takes the most likely.
            freq_penalty: Taken off a drawn token's logit for each time that it stands there already.
            repetition_penalty: Divides positive logits of tokens that stand there (multiplies negative ones).
            use_past_kv_cache: Keeps keys and values; False computes all positions at each step.
            prepend_bos: Whether texts get the start token; None: as `cfg.default_prepend_bos`.
            padding_side: For one text or tokens: the side that padding is on.
            return_type: "str", "tokens", "embeds", or "input" for what was given.
            verbose: Shows a progress bar.
            output_logits: Returns transformers' output with `sequences` and each step's `logits`.
            return_cache: Returns also an ActivationCache of a run of the whole result.
            return_input_tokens: Returns also the tokens that were continued.
            names_filter: Of `return_cache`: which names.
            device: Of `return_cache`: where to.
            stop_strings: A row ends when its text ends with one of these.
            stopping_criteria: transformers' own, one or several.
            attention_mask: 1 where the prompt is no padding; None: found as in a forward.
            return_dict_in_generate: Nothing: TransformerLens takes it and leaves it.
            kwargs: What the model's generate takes besides (`pixel_values`).

        Raises: InputError for what cannot be generated as asked.
        """
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type={return_type!r} is none of {', '.join(map(repr, RETURN_TYPES))}.")
        prompt = self._prompt(input, prepend_bos, padding_side, attention_mask, kwargs)
        settings = self._settings(
            max_new_tokens, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature,
            freq_penalty, repetition_penalty, stop_strings, stopping_criteria, prompt,
        )  # fmt: skip
        if return_cache and prompt.name != "input_ids":
            raise InputError("return_cache takes text or tokens.")
        settings["generation_config"].use_cache = use_past_kv_cache
        if verbose:
            settings["streamer"] = _Bar(max_new_tokens)
        out = self._run(prompt, settings)
        sequences = out.sequences
        if output_logits:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            result: Any = GenerateDecoderOnlyOutput(sequences=sequences, logits=out.logits)
        else:
            result = self._result(prompt, sequences, return_type)
        more: list[Any] = []
        if return_cache:
            new = torch.ones_like(sequences[:, prompt.value.shape[1] :])
            whole = torch.cat([torch.ones_like(prompt.value) if prompt.mask is None else prompt.mask, new], 1)
            options = {} if bool(whole.all()) else {"attention_mask": whole}
            more.append(
                self.run_with_cache(sequences, names_filter=names_filter, device=device, **options)[1]
            )
        if return_input_tokens:
            more.append(prompt.value)
        return (result, *more) if more else result

    def generate_stream(
        self,
        input: str | Sequence[str] | Tensor = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        return_type: str = "input",
        verbose: bool = True,
        stop_strings: str | Sequence[str] | None = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """As `generate`, token by token: yields [batch, new] whenever there are enough, the prompt first.

        Args:
            max_tokens_per_yield: Yields when so many positions have come; the prompt's count too.
            return_type: "str" yields texts; all else yields tokens, as HookedTransformer does.

        The other arguments are those of `generate`. Between two yields the model is free for other runs.
        """
        prompt = self._prompt(input, prepend_bos, padding_side, None, kwargs)
        settings = self._settings(
            1, stop_at_eos, eos_token_id, do_sample, top_k, top_p, temperature,
            freq_penalty, repetition_penalty, stop_strings, stopping_criteria, prompt,
        )  # fmt: skip
        if prompt.name != "input_ids":
            raise InputError("generate_stream continues text or tokens.")
        settings["generation_config"].use_cache = use_past_kv_cache
        if use_past_kv_cache:
            from transformers import DynamicCache

            settings[cache_name(self._root.call_names().takes) or OLD] = DynamicCache()
        held = prompt.value
        ended = torch.zeros(len(held), dtype=torch.bool, device=held.device)
        ends, fill = settings["generation_config"].eos_token_id, settings["generation_config"].pad_token_id
        for _ in tqdm(range(max_new_tokens), disable=not verbose):
            sequences = self._run(prompt, settings).sequences
            new = sequences[:, -1]
            if stop_at_eos and ends is not None:
                new = new.masked_fill(ended, fill)
                ended |= torch.isin(new, torch.tensor(ends, device=new.device))
            held = torch.cat([held, new[:, None]], 1)
            tokens = torch.cat([prompt.value, new[:, None]], 1)
            mask = None if prompt.mask is None else torch.cat([prompt.mask, torch.ones_like(new)[:, None]], 1)
            prompt = _Prompt("input_ids", tokens, mask, prompt.were_texts)
            if held.shape[1] >= max_tokens_per_yield:
                yield self._yielded(held, return_type)
                held = held[:, :0]
            if bool(ended.all()):
                break
        if held.shape[1]:
            yield self._yielded(held, return_type)

    def hf_generate(self, input: Any = "", **kwargs: Any) -> Any:
        """The model's own generate, with its own options and settings; a text gives a text back.

        `return_type` is as in `generate`: "str", "tokens", or "input".
        """
        return_type = kwargs.pop("return_type", "input")
        if return_type not in ("str", "tokens", "input"):
            raise InputError(f"return_type={return_type!r} is none of 'str', 'tokens', 'input'.")
        prompt = self._prompt(input, None, None, kwargs.pop("attention_mask", None), {})
        with self._root.turn(), torch.no_grad(), self._root.running():
            out = self._root.wrapped.generate(**prompt.arguments, **kwargs)
        as_texts = return_type == "str" or (return_type == "input" and prompt.were_texts)
        return self._texts(out) if as_texts and isinstance(out, Tensor) else out

    def _prompt(
        self,
        input: Any,
        prepend_bos: bool | None,
        side: str | None,
        mask: Tensor | None,
        more: dict[str, Any],
    ) -> _Prompt:
        if not callable(getattr(self._root.wrapped, "generate", None)):
            raise InputError(f"The {self.name} tower generates nothing: its model has no generate.")
        self._root.check_ready()
        more = {**self.__dict__["_given"], **more}
        self._root.call_names("generate").check(more)
        texts = [input] if isinstance(input, str) else input
        are_texts = isinstance(texts, list | tuple) and bool(texts) and all(isinstance(t, str) for t in texts)
        if are_texts:
            side = "left" if len(texts) > 1 else side
            input = self.to_tokens(list(texts), prepend_bos=prepend_bos, padding_side=side)
        elif not isinstance(input, Tensor) or input.ndim > 3:
            raise InputError("generate continues a text, a list of texts, tokens or embeddings.")
        if input.is_floating_point():
            check_mask(mask, input)
            return _Prompt("inputs_embeds", input.to(self._root.dtype), mask, False, more)
        input = (input if input.ndim == 2 else input[None]).to(self._root.device)
        if not input.numel():
            raise InputError("generate was given no tokens to continue. Give a text, or one token at least.")
        check_mask(mask, input)
        if mask is None:
            check_padding_side(None if are_texts else side, self.tokenizer)
            known = list(texts) if are_texts and len(texts) > 1 else None
            mask = self.attended_tokens(input, known, prepend_bos, side)
            # The library would guess it from padding tokens.
            mask = torch.ones_like(input) if mask is None else mask
        return _Prompt("input_ids", input, mask.to(input.device), are_texts, more)

    def _settings(
        self,
        max_new_tokens: int,
        stop_at_eos: bool,
        eos: Any,
        do_sample: bool,
        top_k: int | None,
        top_p: float | None,
        temperature: float,
        freq_penalty: float,
        repetition_penalty: float,
        stop_strings: Any,
        criteria: Any,
        prompt: _Prompt,
    ) -> dict[str, Any]:
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens!r}: it must be 1 at least.")
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        own = getattr(self._root.wrapped, "generation_config", None)
        if stop_at_eos and eos is None:
            eos = self.cfg.eos_token_id if self.tokenizer is None else self.tokenizer.eos_token_id
            eos = getattr(own, "eos_token_id", None) if eos is None else eos
            if eos is None:
                raise InputError(
                    "stop_at_eos needs an end token, and the tokenizer has none: pass eos_token_id=."
                )
        ends = None if not stop_at_eos else [eos] if isinstance(eos, int) else list(eos)
        sampled = do_sample and temperature != 0.0
        drawn = {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
        strings, conditions = stop_texts(stop_strings, self.tokenizer), criteria_of(criteria)
        fill = ends[0] if ends else getattr(self.tokenizer, "pad_token_id", None)
        check_fill(len(prompt.value), bool(strings or conditions), fill)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            eos_token_id=ends,
            pad_token_id=0 if fill is None else fill,  # No row ends before the others then.
            repetition_penalty=repetition_penalty,
            return_dict_in_generate=True,
            output_logits=True,
            decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
            **(drawn if sampled else {}),
        )
        settings: dict[str, Any] = {"generation_config": config}
        if freq_penalty and sampled:  # TransformerLens has none for the most likely token.
            if prompt.name != "input_ids":
                raise InputError("freq_penalty counts tokens, and embeddings were given.")
            # The library divides by the temperature afterwards.
            penalty = _FrequencyPenalty(freq_penalty * temperature)
            settings["logits_processor"] = LogitsProcessorList([penalty])
        if strings:
            config.stop_strings = strings
            settings["tokenizer"] = self.tokenizer
        if conditions:
            settings["stopping_criteria"] = StoppingCriteriaList(conditions)
        return settings

    def _run(self, prompt: _Prompt, settings: dict[str, Any]) -> Any:
        with self._root.turn(), torch.no_grad(), self._root.running(), _without_settings(self._root.wrapped):
            return self._root.wrapped.generate(**prompt.arguments, **settings)

    def _result(self, prompt: _Prompt, sequences: Tensor, return_type: str) -> Any:
        if return_type == "input":
            of_tokens = "str" if prompt.were_texts else "tokens"
            return_type = of_tokens if prompt.name == "input_ids" else "embeds"
        if return_type == "str":
            return self._texts(sequences)
        if return_type == "tokens":
            return sequences
        if prompt.name == "input_ids":
            return self.embed(sequences)
        return torch.cat([prompt.value, self.embed(sequences).to(prompt.value)], 1)

    def _texts(self, tokens: Tensor) -> str | list[str]:
        if self.tokenizer is None:
            raise HostAssertionError("Without a tokenizer there are no texts: return_type='tokens'.")
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in tokens.tolist()]
        return texts[0] if len(texts) == 1 else texts

    def _yielded(self, tokens: Tensor, return_type: str) -> Any:
        return self._texts(tokens) if return_type == "str" else tokens


@contextmanager
def _without_settings(model: Any) -> Iterator[None]:
    """The checkpoint's own settings would stand in for what is None."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _FrequencyPenalty:
    """A processor of transformers: takes a penalty off each token's score for each time it stands there."""

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores).scatter_add_(
            1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype)
        )
        return scores - self.penalty * counts


class _Bar:
    """A progress bar, as transformers' streamer."""

    def __init__(self, total: int) -> None:
        self.bar: Any = None
        self.total = total

    def put(self, value: Any) -> None:
        if self.bar is None:  # The first is the prompt.
            self.bar = tqdm(total=self.total)
        else:
            self.bar.update()

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
