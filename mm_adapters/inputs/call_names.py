"""The names of what a model's call takes, and the error for a name that it does not take."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mm_adapters._errors import InputError
from mm_adapters.inputs.cache_argument import NEW, OLD
from mm_adapters.sites.site_map import SiteMap

Call = Literal["forward", "generate"]

# What this package adds to every call, and to a pipeline's.
RAW = ("text", "images")
SEED = "seed"
# transformers' decorators take these from the keywords of any forward.
_OF_ANY_FORWARD = (
    "return_dict",
    "use_cache",
    "debug_io",
    "debug_io_dir",
    "prune_layers",
    "mm_encoder_outputs",
)
# diffusers' pipelines pop these from keywords that they do not declare.
_OLD_CALLBACKS = ("callback", "callback_steps", "prior_callback", "prior_callback_steps")
# transformers' generate pops these from its keywords.
_OF_ANY_GENERATE = ("tokenizer", "assistant_tokenizer", "trust_remote_code", "use_model_defaults")
# Options of the methods around a call: not taken by it, and a misspelt one is nearest to them.
_AROUND = (
    "names_filter", "remove_batch_dim", "return_cache_object", "incl_bwd", "fwd_hooks", "bwd_hooks",
    "reset_hooks_end", "clear_contexts", "read", "edit", "grad_of",
)  # fmt: skip


@dataclass(frozen=True)
class CallNames:
    """What a call takes: the model's `own` arguments in their order, and what it `passes_on`.

    `is_open`: it hands any name on to what this package cannot look into.
    """

    what: str
    own: tuple[str, ...]
    added: tuple[str, ...] = ()
    passes_on: frozenset[str] = frozenset()
    is_open: bool = False

    def takes(self, name: str) -> bool:
        """Whether the call takes an argument of this name."""
        return self.is_open or name in {*self.own, *self.added, *self.passes_on}

    def check(self, given: Iterable[str]) -> None:
        """Raises: InputError for a name that is not taken, with the nearest."""
        known = {*self.own, *self.added, *self.passes_on}
        unknown = [] if self.is_open else [name for name in given if name not in known]
        if unknown:
            shown = [*self.added, *self.own]
            raise unknown_name(f"{self.what} does not take", unknown, shown, [*known, *_AROUND])


def unknown_name(
    what: str, unknown: Iterable[str], shown: Iterable[str], near: Iterable[str] = ()
) -> InputError:
    """The error for options that nobody takes: which, the nearest, and what there is."""
    names = list(unknown)
    candidates = sorted({*shown, *near})
    close = {n: difflib.get_close_matches(n, candidates, n=2, cutoff=0.6) for n in names}
    hints = [f"Did you mean {' or '.join(found)}?" for found in close.values() if found]
    listed = ", ".join(f"{name}=" for name in names)
    return InputError(f"{what} {listed}. {' '.join([*hints, ''])}It takes {', '.join(shown)}.")


def refuse_unknown(what: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raises: InputError if there is any unknown option of a function of this package."""
    if names := list(unknown):
        raise unknown_name(f"{what} does not take", names, known)


def call_names(wrapped: Any, sites: SiteMap, call: Call = "forward") -> CallNames:
    """What the wrapped model's forward or generate takes, or a pipeline's call."""
    if sites.model_record.kind == "diffusion":
        return _of_pipeline(wrapped)
    return _of_generate(wrapped, sites) if call == "generate" else _of_forward(wrapped, sites)


def tower_names(what: str, target: Callable[..., Any]) -> CallNames:
    """What a tower alone takes: `target` is its module, or the function of the model that runs it."""
    function = type(target).forward if hasattr(target, "forward") else target
    own, passes_on, is_open = _read(function)
    return CallNames(what, own, (), passes_on, is_open)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The named parameters of a function or method, in their order."""
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if n not in ("self", "cls") and p.kind not in fixed}


def _of_pipeline(pipeline: Any) -> CallNames:
    call = type(pipeline).__call__
    own, _, takes_any = _read(call)
    passes_on = frozenset(_OLD_CALLBACKS) if takes_any or "callback_steps" in own else frozenset()
    return CallNames(type(pipeline).__name__, own, (*RAW, SEED), passes_on)


def _of_forward(model: Any, sites: SiteMap) -> CallNames:
    own, passes_on, is_open = _read(type(model).forward)
    if passes_on:
        # Its keywords reach the towers: a vision tower's interpolate_pos_encoding, a decoder's cache.
        for tower in sites.towers.values():
            passes_on |= {*_read(type(tower.module).forward)[0]}
    return CallNames(type(model).__name__, own, RAW, passes_on, is_open)


def _of_generate(model: Any, sites: SiteMap) -> CallNames:
    if not callable(getattr(type(model), "generate", None)):
        raise InputError(
            f"{type(model).__name__} generates nothing: it has no generate. Call it, or run it: "
            "model.run(...)."
        )
    forward = _of_forward(model, sites)
    own = tuple(parameters_of(type(model).generate))
    from transformers import GenerationConfig

    settings = {
        *vars(GenerationConfig()),
        *getattr(getattr(model, "generation_config", None), "__dict__", {}),
    }
    passes_on = {n for n in settings if not n.startswith("_")} | {*_OF_ANY_GENERATE, *forward.own}
    base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    for part, prefix in (("encoder", ""), ("decoder", "decoder_")):
        inner = getattr(model, part, None) or getattr(base, part, None)
        if inner is not None and hasattr(type(inner), "forward"):
            passes_on |= {prefix + name for name in _read(type(inner).forward)[0]}
    if hasattr(type(model), "prepare_inputs_for_generation"):
        passes_on |= {*parameters_of(type(model).prepare_inputs_for_generation)}
    what = f"{type(model).__name__}.generate"
    return CallNames(what, own, RAW, frozenset(passes_on) | forward.passes_on, forward.is_open)


def _read(function: Any) -> tuple[tuple[str, ...], frozenset[str], bool]:
    """A function's own names, those that its keywords may have besides, and whether they may be any."""
    own = tuple(parameters_of(function))
    parameters = inspect.signature(function).parameters.values()
    keywords = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    renamed = frozenset({OLD} if NEW in own else ())
    if keywords is None:
        return own, renamed, False
    home = inspect.unwrap(function).__module__ or ""
    if not home.startswith("transformers."):
        return own, frozenset(), True
    from transformers.utils.generic import TransformersKwargs

    named = {*TransformersKwargs.__annotations__, *_OF_ANY_FORWARD, *renamed}
    for typed in get_args(keywords.annotation):
        named |= {*getattr(typed, "__annotations__", {})}
    return own, frozenset(named), False
