"""One tower as a TransformerLens model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from mm_adapters.hooks.wiring import Points
from mm_adapters.inputs.call_names import tower_names
from mm_adapters.records.resolve import head_count
from mm_adapters.records.spec import Attention, Input, Norm, Output
from mm_adapters.records.stages import Stages
from mm_adapters.sites.site_map import resolve
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.sites.weights import tensor_at
from mm_adapters.tl_engine.cache import TowerCache
from mm_adapters.tl_engine.counted_hooks import CountedHooks, check_cached, check_device
from mm_adapters.tl_engine.tower_tokens import TowerTokens
from mm_adapters.tl_engine.tower_weights import TowerWeights


@dataclass
class TowerConfig(TransformerLensConfig):
    """TransformerLens' configuration of one tower. `tower` is its name, `d_vocab_out` its logits."""

    tower: str = ""
    model_name: str = ""
    d_vocab_out: int = -1
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    ungroup_grouped_query_attention: bool = False
    tokenizer_prepends_bos: bool = True
    parallel_attn_mlp: bool = False


class Part(nn.Module):
    """A node in the tree of HookPoints. `weights` are the tensors of the module that it represents."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Callable[[], Tensor]] = {}
        self.follow: Callable[[], None] | None = None  # Called first: the model may have other modules now.
        self.stands_for: list[nn.Module] = []  # In a list: not a submodule.

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("weights", {}):
            return super().__getattr__(name)
        if self.follow is not None:
            self.follow()
        return self.weights[name]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module that it represents returns."""
        return self.stands_for[0](*args, **kwargs)


class HookedTower(TowerTokens, TowerWeights, HookedRootModule):
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
        self._build(points)
        self.eval()

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
        self.setup()
        self._name_weights()
        self.cfg = self._config()

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
        return self._root.tokenizer_of(self.name)

    @property
    def appends_end(self) -> bool:  # type: ignore[override]
        return self._mounted.record.role == "text"

    @property
    def W_gate(self) -> Tensor | None:  # type: ignore[override]
        blocks: Any = self.blocks
        return torch.stack([b.mlp.W_gate for b in blocks]) if self.cfg.gated_mlp else None

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

    def forward(self, input: Any, return_type: str | None = "logits", **kwargs: Any) -> Any:
        """Runs the tower on text, tokens or pixels, whichever it takes.

        `return_type`: "logits" as the class docstring says, "embeds" for the summary, "loss" or
        "both" for a language tower's next-token loss, "module" for the module's own output, None for
        nothing. Texts of a language tower that differ in length get an `attention_mask`; where it is 0
        nothing is attended to, and no loss counted.
        """
        with self._root.turn():
            self._root.check_ready()
            return self._forward(input, return_type, **kwargs)

    def _forward(self, input: Any, return_type: str | None, **kwargs: Any) -> Any:
        mounted = self.__dict__["_mounted"]
        kwargs = {**self.__dict__["_given"], **kwargs}
        kwargs.pop("prepend_bos", None)
        kwargs.pop("padding_side", None)
        if isinstance(input, str) or (isinstance(input, list) and input and isinstance(input[0], str)):
            texts = [input] if isinstance(input, str) else input
            input = self.to_tokens(texts)
            if mounted.role == "language" and not bool((attended := self.attended(texts)).all()):
                kwargs.setdefault("attention_mask", attended)
        name = mounted.input_name
        run = mounted.mount.run
        target = mounted.module if run is None else resolve(self._root.wrapped, run)
        if kwargs:
            whole = target is self._root.wrapped
            names = self._root.call_names() if whole else tower_names(f"The {mounted.name} tower", target)
            names.check(kwargs)
        with self._root.running():
            output = target(**{name: input}, **kwargs) if mounted.record.gives else target(input, **kwargs)
        if return_type is None:
            return None
        if return_type == "module":
            return output
        summary = mounted.pooled_output(output)
        if return_type in ("loss", "both"):
            loss = next_token_loss(summary, input, kwargs.get("attention_mask"))
            return loss if return_type == "loss" else (summary, loss)
        if return_type == "logits" and self._class_directions is not None:
            return summary @ self._class_directions.to(summary).T
        return summary

    def to_single_token(self, string: str) -> int:
        """The id of a string that is one token; of a class, where the tower has classes."""
        return super().to_single_token(string) if self._class_names is None else self._class_index(string)

    def generate(self, input: Any = "", max_new_tokens: int = 10, **kwargs: Any) -> Any:
        """Continues a text, or tokens, with the whole model's `generate`; a text gives a text back."""
        tokens = self.to_tokens(input) if isinstance(input, str) else input
        kwargs.setdefault("do_sample", False)
        with self._root.turn(), self._root.running():
            out = self._root.wrapped.generate(input_ids=tokens, max_new_tokens=max_new_tokens, **kwargs)
        return self.to_string(out[0]) if isinstance(input, str) else out

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

    def _hang(self, local: str, point: nn.Module) -> None:
        *path, leaf = local.split(".")
        owner: nn.Module = self
        for step in path:
            known = dict(owner.named_children())
            if step not in known:
                owner.add_module(step, Part())
            owner = owner.get_submodule(step)
        owner.add_module(leaf, point)

    def _name_weights(self) -> None:
        mounted = self.__dict__["_mounted"]
        for part in self.modules():
            if isinstance(part, Part):
                part.weights, part.stands_for, part.follow = {}, [], self._root.follow
        for stack in mounted.stacks:
            repeated: Any = self.get_submodule(stack)
            for layer, block in enumerate(repeated):
                source = mounted.weights(layer, stack)
                for name, part in block.named_children():
                    if not isinstance(part, Part):
                        continue
                    part.weights = source.names(name)
                    location = mounted.parts[stack][layer].get(f"{name}.hook_scale")
                    if isinstance(location, Norm):
                        part.stands_for = [source.block.get_submodule(location.path)]
        norm = mounted.final_norm
        if norm is not None:
            final: Any = self.ln_final
            final.weights = {"w": lambda: norm.gain, "b": lambda: norm.bias}
            final.stands_for = [norm.module]

    def _config(self) -> TowerConfig:
        mounted: TowerView = self.__dict__["_mounted"]
        record = mounted.record
        parts = mounted.parts["blocks"][0] if mounted.parts.get("blocks") else {}
        device, dtype = self._root.device, self._root.dtype
        common: dict[str, Any] = {
            "tower": mounted.name,
            "device": str(device),
            "dtype": dtype,
            "model_name": self._root.sitemap.family,
            "normalization_type": record.norm,
        }
        first_block: Any = self.blocks[0] if "attn.hook_q" in parts else None
        weights: Any = first_block.attn.weights if first_block is not None else {}
        # Of stages of several widths and numbers of heads no one number is right.
        if isinstance(record.order, Stages) or not weights.keys() & {"W_Q", "W_O"}:
            return TowerConfig(d_model=0, d_head=0, n_heads=0, n_layers=len(self.blocks), n_ctx=0, **common)
        location, kv_location = parts["attn.hook_q"], parts["attn.hook_k"]
        assert isinstance(location, Output | Input | Attention)
        assert isinstance(kv_location, Output | Input | Attention)
        first = mounted.module.get_submodule(mounted.stacks["blocks"][0])
        assert location.heads is not None
        assert kv_location.heads is not None
        n_heads, n_kv = head_count(first, location.heads), head_count(first, kv_location.heads)
        block: Any = self.blocks[0]
        _, d_model, d_head = block.attn.W_Q.shape if "W_Q" in weights else block.attn.W_O.mT.shape
        vocabulary = tensor_at(mounted.module, record.embed) if record.embed else None
        d_vocab = -1 if vocabulary is None else vocabulary.shape[0]
        gated = "mlp.hook_pre_linear" in parts
        has_mlp = "mlp.hook_post" in parts
        return TowerConfig(
            d_model=d_model,
            d_head=d_head,
            n_heads=n_heads,
            n_key_value_heads=n_kv if n_kv != n_heads else None,
            n_layers=len(self.blocks),
            n_ctx=mounted.context_length or 0,
            d_mlp=block.mlp.W_out.shape[0] if has_mlp else None,
            d_vocab=d_vocab,
            d_vocab_out=d_vocab if record.role == "language" else -1,
            gated_mlp=gated,
            uses_rms_norm=record.norm == "RMS",
            attn_only=not has_mlp,
            positional_embedding_type="rotary" if "attn.hook_rot_q" in parts else "standard",
            eps=getattr(getattr(self, "ln_final", None), "eps", 1e-5),
            **common,
        )


def next_token_loss(logits: Tensor, tokens: Any, attended: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of each token given those before it, as TransformerLens'.

    Where `attended` is 0 a position neither predicts nor is predicted.
    """
    targets = tokens[:, 1:]
    if attended is not None:
        targets = targets.masked_fill(~(attended[:, :-1].bool() & attended[:, 1:].bool()), -100)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100
    )
