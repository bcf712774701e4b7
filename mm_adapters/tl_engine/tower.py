"""One tower as a TransformerLens model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from mm_adapters._errors import InputError
from mm_adapters.hooks.wiring import Points
from mm_adapters.records.spec import Attention, Input, Norm, Output
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tl_engine.cache import TowerCache
from mm_adapters.tl_engine.counted_hooks import CountedHooks, check_cached, check_device
from mm_adapters.tl_engine.generation import TowerGeneration
from mm_adapters.tl_engine.parts import Embedding, Part, Positions, Unembedding
from mm_adapters.tl_engine.tower_call import TowerCall
from mm_adapters.tl_engine.tower_config import TowerConfig, tower_config
from mm_adapters.tl_engine.tower_flags import POINTS, TowerFlags
from mm_adapters.tl_engine.tower_state import TowerState
from mm_adapters.tl_engine.tower_tokens import TowerTokens
from mm_adapters.tl_engine.tower_weights import TowerWeights
from mm_adapters.tl_engine.wrapped_members import WrappedMembers


class HookedTower(
    WrappedMembers,
    TowerCall,
    TowerGeneration,
    TowerFlags,
    TowerState,
    TowerTokens,
    TowerWeights,
    HookedRootModule,
):
    """A TransformerLens model over one tower: local hook names, weights, tokens, its own cache.

    Calling it runs the tower alone. It returns logits where the tower has an unembedding (a
    language model's vocabulary, or the classes given to `set_classes`: un-normalised, the dot
    product with each class's unit vector), else the tower's summary (an image or text embedding).
    """

    def __init__(self, root: Any, mounted: TowerView, points: Points) -> None:
        super().__init__()
        self.__dict__["_root"] = root
        self.__dict__["_mounted"] = mounted
        self.__dict__["_tower_name"] = mounted.name
        self._class_names = None
        self._class_directions = None
        self.__dict__["_given"] = {}
        self.__dict__["_derived"], self.__dict__["_head_inputs"] = {}, {}
        self._build(points)
        nn.Module.train(self, False)  # Its points; the model is as it was given.

    def move(self, mounted: TowerView, points: Points) -> None:
        """Stands for the tower as it is now, after modules were put in place of others."""
        self.__dict__["_mounted"] = mounted
        for part in list(self.modules()):
            for name in [n for n, child in part._modules.items() if isinstance(child, HookPoint)]:
                del part._modules[name]
        self._build(points)
        if self._class_names is not None:
            self._resize(len(self._class_names))

    def _build(self, points: Points) -> None:
        """The tree of parts and points, with the weights of the modules that they stand for."""
        mounted = self.__dict__["_mounted"]
        for stack, paths in mounted.stacks.items():
            parts: Any = self._modules.get(stack, ())
            kept = list(parts)[: len(paths)]
            self.add_module(stack, nn.ModuleList([*kept, *(Part() for _ in paths[len(kept) :])]))
        if "blocks" not in mounted.stacks:
            self.blocks = nn.ModuleList()
        for name, point in points.by_name.items():
            if point.site.tower == mounted.name:
                self._hang(name.removeprefix(f"{mounted.name}."), point)
        for name, point in self._derived.items():
            self._hang(name, point)
        if mounted.role in ("vision", "text", "language", "audio"):
            self.add_module("unembed", Unembedding())
        if mounted.record.embed:
            self.add_module("embed", Embedding())
        if mounted.record.position and mounted.role in ("text", "language"):
            self.add_module("pos_embed", Positions())
        self.share_own_members()
        self.setup()
        self._name_weights()
        before = self.__dict__.get("cfg")
        self.cfg = self._config()
        for flag in POINTS if before is not None else ():
            setattr(self.cfg, flag, getattr(before, flag))

    # TransformerLens gives every module a name attribute; the tower's is the prefix of its sites.
    @property
    def name(self) -> str:  # type: ignore[override]
        return self.__dict__["_tower_name"]

    @name.setter
    def name(self, value: str) -> None:
        assert value == self.__dict__["_tower_name"]

    @property
    def _mounted(self) -> TowerView:
        self._root.follow()
        return self.__dict__["_mounted"]

    # Points are shared with the whole model, and so is the level that says which hooks are whose.
    @property
    def context_level(self) -> int:
        return self._root.context_level

    @context_level.setter
    def context_level(self, level: int) -> None:
        if "mod_dict" in self.__dict__:
            self._root.context_level = level

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.__dict__.get("_tokenizer") or self._root.tokenizer_of(self.name)

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.__dict__["_tokenizer"] = tokenizer

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Tokenizes with this one from now on; the whole model keeps its own.

        Raises: InputError if it is no tokenizer of transformers, or the side is none.
        """
        if not (callable(tokenizer) and hasattr(tokenizer, "padding_side")):
            raise InputError(f"A {type(tokenizer).__name__} is no tokenizer: pass one of transformers.")
        self.pads_left(default_padding_side) if self.tokenizer is not None else None
        self.tokenizer = tokenizer
        if default_padding_side is not None:
            tokenizer.padding_side = default_padding_side

    @property
    def appends_end(self) -> bool:  # type: ignore[override]
        return self._mounted.record.role == "text"

    @contextmanager
    def given(self, **inputs: Any) -> Iterator[None]:
        """Every call inside also gets these inputs: `pixel_values` for a language tower that looks.

        For scripts and TransformerLens functions that pass tokens only.
        """
        before = self.__dict__["_given"]
        self.__dict__["_given"] = {**before, **inputs}
        try:
            yield
        finally:
            self.__dict__["_given"] = before

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; of a class, where the tower has classes."""
        return super().to_single_token(string) if self._class_names is None else self._class_index(string)

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As TransformerLens'. No other thread runs the model inside."""
        with self._root.turn(), super().hooks(*args, **kwargs) as hooked, self._root.eagerly():
            try:
                yield hooked
            finally:
                self._root.points.unwind()

    def run_with_cache(self, *args: Any, return_cache_object: bool = True, **kwargs: Any) -> Any:
        """As HookedTransformer's: the output and an ActivationCache under local names."""
        check_device(kwargs.get("device"))
        remove = kwargs.get("remove_batch_dim", False)
        output, values = super().run_with_cache(*args, **kwargs)
        check_cached(kwargs.get("names_filter"), values, f"{self.name}.")
        local_values = {key.removeprefix(f"{self.name}."): value for key, value in values.items()}
        return output, TowerCache(
            local_values, self, has_batch_dim=not remove
        ) if return_cache_object else local_values

    def run_with_hooks(self, *args: Any, fwd_hooks: Any = (), **kwargs: Any) -> Any:
        """As TransformerLens'. Raises: ReadNeverFiredError if a hook was never called."""
        counted = CountedHooks(fwd_hooks)
        output = super().run_with_hooks(*args, fwd_hooks=counted.hooks, **kwargs)
        counted.check()
        return output

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any):
        """As TransformerLens'. Raises: MissingSiteError for a name that is no site."""
        self._root.check_names(names_filter, self.name)
        return super().get_caching_hooks(names_filter, *args, **kwargs)

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """As TransformerLens'. Raises: MissingSiteError for a name that is no site."""
        self._root.check_names(name, self.name)
        super().add_hook(name, *args, **kwargs)

    def _enable_hook_with_name(self, name: str, hook: Callable[..., Any], dir: Any) -> None:
        self._root.check_names(name, self.name)
        super()._enable_hook_with_name(name, hook, dir)

    def kept(self) -> dict[str, Any]:
        """What was set on it, for a copy: its classes, its tokenizer, its switches."""
        return {
            "classes": (self._class_names, self._class_directions),
            "tokenizer": self.__dict__.get("_tokenizer"),
            "flags": [flag for flag in POINTS if getattr(self.cfg, flag)],
        }

    def keep(self, state: dict[str, Any]) -> None:
        """Sets what `kept` gave."""
        names, directions = state["classes"]
        if names is not None:
            self._class_names, self._class_directions = names, directions
            self._resize(len(names))
        self.__dict__["_tokenizer"] = state["tokenizer"]
        for flag in state["flags"]:
            self._switch(flag, True)

    def __reduce__(self) -> Any:
        return _tower_of, (self._root, self.name)

    def _hang(self, local: str, point: nn.Module) -> None:
        *path, leaf = local.split(".")
        owner: nn.Module = self
        for step in path:
            known = dict(owner.named_children())
            if step not in known:
                owner.add_module(step, Part())
            owner = owner.get_submodule(step)
        owner.add_module(leaf, point)

    def _unhang(self, local: str) -> None:
        path, _, leaf = local.rpartition(".")
        del self.get_submodule(path)._modules[leaf]

    def _name_weights(self) -> None:
        mounted = self.__dict__["_mounted"]
        for part in self.modules():
            if isinstance(part, Part):
                part.weights, part.stands_for, part.follow = {}, [], self._root.follow
        for stack in mounted.stacks:
            repeated: Any = self.get_submodule(stack)
            for layer, block in enumerate(repeated):
                source = mounted.weights(layer, stack)
                block.stands_for = [source.block]
                for name, part in block.named_children():
                    if not isinstance(part, Part):
                        continue
                    part.weights = source.names(name)
                    location = _module_of(name, mounted.parts[stack][layer])
                    if location is not None:
                        part.stands_for = [source.block.get_submodule(location)]
        norm = mounted.final_norm
        if norm is not None:
            final: Any = self.ln_final
            final.weights = {"w": lambda: norm.gain, "b": lambda: norm.bias}
            final.stands_for = [norm.module]
        ends = {"embed": ("W_E",), "pos_embed": ("W_pos",), "unembed": ("W_U", "b_U")}
        for name, weights in ends.items():
            if name in self._modules:
                end: Any = self._modules[name]
                end.weights = {w: lambda w=w: getattr(self, w) for w in weights}
        if "embed" in self._modules:
            owner, _, leaf = (mounted.record.embed or "").rpartition(".")
            embed: Any = self._modules["embed"]
            embed.stands_for = [mounted.module.get_submodule(owner)] if leaf == "weight" else []

    def _config(self) -> TowerConfig:
        root = self._root
        return tower_config(
            self.__dict__["_mounted"],
            device=str(root.device),
            dtype=root.dtype,
            model_name=root.sitemap.family,
            original_architecture=type(root.wrapped).__name__,
            tokenizer_name=getattr(self.tokenizer, "name_or_path", None),
        )


def _tower_of(root: Any, name: str) -> HookedTower:
    return root.tower(name)


def _module_of(part: str, locations: dict[str, Any]) -> str | None:
    """The path of the module that a part of a block stands for: a norm, an attention, an MLP; or None."""
    norm = locations.get(f"{part}.hook_scale")
    if isinstance(norm, Norm):
        return norm.path
    inside = locations.get(f"{part}.hook_pattern")
    if isinstance(inside, Attention):
        return inside.path
    whole, neurons = locations.get(f"hook_{part}_out"), locations.get(f"{part}.hook_post")
    if not isinstance(whole, Output) or not isinstance(neurons, Input | Output):
        return None
    return whole.path if neurons.path.startswith(f"{whole.path}.") else None
