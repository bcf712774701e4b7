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
from mm_adapters.tl_engine.folded import FoldedWeights, folded_weights
from mm_adapters.tl_engine.generation import TowerGeneration
from mm_adapters.tl_engine.generation_checks import check_backward, said_as_no_gradient
from mm_adapters.tl_engine.host_members import HostMembers
from mm_adapters.tl_engine.parts import Embedding, Part, Positions, Unembedding
from mm_adapters.tl_engine.tower_call import TowerCall
from mm_adapters.tl_engine.tower_config import TowerConfig, tower_config
from mm_adapters.tl_engine.tower_flags import POINTS, TowerFlags
from mm_adapters.tl_engine.tower_state import TowerState
from mm_adapters.tl_engine.tower_tokens import TowerTokens
from mm_adapters.tl_engine.tower_weights import TowerWeights
from mm_adapters.tl_engine.unembed_points import unembed_points
from mm_adapters.tl_engine.wrapped_members import WrappedMembers


class HookedTower(
    WrappedMembers,
    TowerCall,
    TowerGeneration,
    TowerFlags,
    TowerState,
    TowerTokens,
    TowerWeights,
    HostMembers,
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
        self.__dict__["_unembed_points"] = {}
        self._build(points)
        nn.Module.train(self, False)  # Its points; the model is as it was given.

    def move(self, mounted: TowerView, points: Points) -> None:
        """Stands for the tower as it is now, after modules were put in place of others."""
        self.__dict__["_mounted"] = mounted
        for part in [m for m in self.modules() if not isinstance(m, HookPoint)]:
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
            self._hang_unembed(mounted)
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
            self.cfg.__dict__[flag] = getattr(before, flag)
        self.cfg.watch(POINTS, self._switch)

    def _hang_unembed(self, mounted: TowerView) -> None:
        """The points around what makes logits, where one module does."""
        if mounted.unembedding_module is None:
            return
        if not self.__dict__["_unembed_points"]:
            self.__dict__["_unembed_points"] = unembed_points(lambda: self._mounted.unembedding_module)
        for name, point in self.__dict__["_unembed_points"].items():
            self._hang(name, point)
            point.watch_again()

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
    def root(self) -> Any:
        """The whole model."""
        return self._root

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The tower's own if one was set, else the model's; padding is its end token if it has none."""
        own = self.__dict__
        tokenizer = own["_tokenizer"] if "_tokenizer" in own else self._root.tokenizer_of(self.name)
        # As HookedTransformer does: TransformerLens' functions ask a model's tokenizer for its padding.
        if getattr(tokenizer, "pad_token", "") is None and getattr(tokenizer, "eos_token", None) is not None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

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

    @property
    def folded(self) -> FoldedWeights:
        """Its weights folded and centred as HookedTransformer's are by default; the model keeps its own."""
        return folded_weights(self)

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
        """As HookedTransformer's: the output and an ActivationCache under local names.

        Raises: InputError if `incl_bwd` is asked for, and the output is no scalar that has a gradient.
        """
        check_device(kwargs.get("device"))
        if kwargs.get("incl_bwd"):
            return_type = kwargs.get("return_type", args[1] if len(args) > 1 else "logits")
            per_token, stop = kwargs.get("loss_per_token", False), kwargs.get("stop_at_layer")
            # A hook may bring in weights of its own: `said_as_no_gradient` tells then.
            tracked = any(p.requires_grad for p in self.parameters()) or any(
                point.fwd_hooks for point in self.hook_points()
            )
            check_backward(return_type, per_token, stop, tracked)
        remove = kwargs.get("remove_batch_dim", False)
        with said_as_no_gradient():
            output, values = super().run_with_cache(*args, **kwargs)
        check_cached(kwargs.get("names_filter"), values, f"{self.name}.")
        return output, TowerCache(values, self, has_batch_dim=not remove) if return_cache_object else values

    def run_with_hooks(self, *args: Any, fwd_hooks: Any = (), **kwargs: Any) -> Any:
        """As TransformerLens'. Raises: ReadNeverFiredError if a hook was never called."""
        counted = CountedHooks(fwd_hooks)
        output = super().run_with_hooks(*args, fwd_hooks=counted.hooks, **kwargs)
        counted.check()
        return output

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any):
        """As TransformerLens'. Raises: MissingSiteError for a name that is no site."""
        self.check_names(names_filter)
        return super().get_caching_hooks(names_filter, *args, **kwargs)

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """As TransformerLens'. Raises: MissingSiteError for a name that is no site."""
        self.check_names(name)
        super().add_hook(name, *args, **kwargs)

    def _enable_hook_with_name(self, name: str, hook: Callable[..., Any], dir: Any) -> None:
        self.check_names(name)
        super()._enable_hook_with_name(name, hook, dir)

    def own_state(self) -> dict[str, Any]:
        """What was set on it, for a copy: its classes, its tokenizer, its switches."""
        return {
            "classes": (self._class_names, self._class_directions),
            **({"tokenizer": self.__dict__["_tokenizer"]} if "_tokenizer" in self.__dict__ else {}),
            "flags": [flag for flag in POINTS if getattr(self.cfg, flag)],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Sets what `own_state` gave."""
        names, directions = state["classes"]
        if names is not None:
            self._class_names, self._class_directions = names, directions
            self._resize(len(names))
        if "tokenizer" in state:
            self.tokenizer = state["tokenizer"]
        for flag in state["flags"]:
            self._switch(flag, True)

    def __copy__(self) -> HookedTower:
        """Another view of the same tower, whose tokenizer can be another."""
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

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
            tokenizer_prepends_bos=_prepends_start(self.tokenizer),
        )


def _prepends_start(tokenizer: Any) -> bool:
    start = getattr(tokenizer, "bos_token_id", None)
    return start is not None and list(tokenizer("")["input_ids"])[:1] == [start]


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
