"""Puts what is served where TransformerLens' tests build a model: its own object over it, or our tower.

`install("theirs")` and `install("ours")` differ only in `_hooked` and `_bridge`: the weights, the tokenizer
and what the caller asked for are the same. Weights are never processed: a fold is one more function of
HookedTransformer, which a tower refuses by name. What cannot be an OPT (a name not served, attention with
fewer keys than queries) is built by TransformerLens in both runs, and does not count as reached.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from foreign.transformer_lens import reach, served

from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.pretrained.weight_conversions.opt import convert_opt_weights

OPT = "facebook/opt-125m"  # The name under which TransformerLens reads an OPT.
_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases",
               "refactor_factored_attn_matrices")  # fmt: skip
_FLAGS = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in")
_config_now: list[Any] = []  # The configuration that TransformerLens is about to ask the hub for.


def install(whose: str, tokenizer_folder: str) -> None:
    """Patches this process. `whose` is "theirs" or "ours"."""
    build = _Ours() if whose == "ours" else _Theirs()
    _serve_hub(tokenizer_folder)
    _serve_hooked(build)
    _serve_bridge(build)


def _serve_hub(tokenizer_folder: str) -> None:
    """transformers' own loaders of a served name."""

    def config(load: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
        if _config_now and name == OPT:
            return copy.deepcopy(_config_now[-1])
        key = served.official(name)
        return load(name, *args, **kwargs) if key is None else served.named(key).config

    def model(load: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
        key = served.official(name)
        if key is None:
            return load(name, *args, **kwargs)
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        loaded = served.named(key).to(torch.float32 if dtype in (None, "auto") else dtype)
        if "attn_implementation" in kwargs:
            loaded.set_attn_implementation(kwargs["attn_implementation"])
        return loaded

    def tokenizer(load: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> Any:
        if served.official(name) is None:
            return load(name, *args, **kwargs)
        for hub_only in ("token", "trust_remote_code", "use_fast", "revision", "cache_dir"):
            kwargs.pop(hub_only, None)
        loaded = load(tokenizer_folder, *args, **kwargs)
        loaded.name_or_path = loaded.init_kwargs["name_or_path"] = name
        return loaded

    for owner, loader in (
        (transformers.AutoConfig, config),
        (transformers.AutoModelForCausalLM, model),
        (transformers.AutoTokenizer, tokenizer),
    ):
        _replace(owner, "from_pretrained", loader)


def _replace(owner: Any, name: str, loader: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, classmethod(lambda cls, *args, **kwargs: loader(original, *args, **kwargs)))


def _serve_hooked(build: Any) -> None:
    from_pretrained = HookedTransformer.from_pretrained.__func__
    new, init = HookedTransformer.__new__, HookedTransformer.__init__

    def load(cls: Any, model_name: str, *args: Any, **kwargs: Any) -> Any:
        key = served.official(model_name)
        if cls is not HookedTransformer or key is None or kwargs.keys() & _CHECKPOINTS or len(args) > 3:
            return from_pretrained(cls, model_name, *args, **kwargs)
        kwargs |= dict(zip(_PROCESSING, args, strict=False))
        opt = kwargs.get("hf_model") or served.named(key)
        if type(opt) is not transformers.OPTForCausalLM:
            return from_pretrained(cls, model_name, *args, **kwargs)
        tokenizer = kwargs.get("tokenizer") or transformers.AutoTokenizer.from_pretrained(model_name)
        _trim(opt, kwargs.get("first_n_layers"), kwargs.get("n_ctx"))
        return build.named_hooked(from_pretrained, opt, tokenizer, kwargs)

    def make(cls: Any, cfg: Any = None, *args: Any, **kwargs: Any) -> Any:
        plan = _plan(cfg) if cls is HookedTransformer and not _config_now else None
        if plan is None or build.keeps_class:
            return new(cls)
        return build.configured_hooked(plan, *args, **kwargs)

    def initialise(self: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        plan = _plan(cfg) if type(self) is HookedTransformer and not _config_now else None
        if plan is None:
            init(self, cfg, *args, **kwargs)
        else:
            build.configured_hooked(self, init, plan, *args, **kwargs)

    HookedTransformer.from_pretrained = classmethod(load)  # type: ignore[method-assign]
    HookedTransformer.__new__ = make  # type: ignore[method-assign]
    HookedTransformer.__init__ = initialise  # type: ignore[method-assign]


_CHECKPOINTS = {"checkpoint_index", "checkpoint_value", "checkpoint_label"}


def _serve_bridge(build: Any) -> None:
    boot, native = TransformerBridge.boot_transformers, TransformerBridge.boot_native.__func__

    def load(model_name: Any, *args: Any, **kwargs: Any) -> Any:
        key = served.official(model_name)
        whole = not args and kwargs.get("load_weights", True) and not kwargs.keys() & _BOOT_ONLY
        opt = kwargs.get("hf_model") or (served.named(key) if key is not None else None)
        if key is None or not whole or type(opt) is not transformers.OPTForCausalLM:
            return boot(model_name, *args, **kwargs)
        tokenizer = kwargs.get("tokenizer") or transformers.AutoTokenizer.from_pretrained(model_name)
        _trim(opt, None, kwargs.get("n_ctx"))
        dtype = kwargs.get("dtype", torch.float32)
        return build.bridge(opt.to(dtype), tokenizer, str(model_name))

    def load_native(cls: Any, config: Any, tokenizer: Any = None, *args: Any, **kwargs: Any) -> Any:
        plan = _plan(config)
        if plan is None or args:
            return native(cls, config, tokenizer, *args, **kwargs)
        opt = plan.opt.to(kwargs.get("dtype") or plan.cfg.dtype)
        return build.bridge(opt, tokenizer, kwargs.get("model_name", "native"))

    TransformerBridge.boot_transformers = staticmethod(load)  # type: ignore[method-assign]
    TransformerBridge.boot_native = classmethod(load_native)  # type: ignore[method-assign]


_BOOT_ONLY = {"checkpoint_index", "checkpoint_value", "revision", "device_map", "n_devices",
              "max_memory", "model_class", "hf_config_overrides"}  # fmt: skip


def _trim(opt: Any, n_layers: int | None, n_ctx: int | None) -> None:
    if n_layers is not None:
        opt.model.decoder.layers = opt.model.decoder.layers[:n_layers]
        opt.config.num_hidden_layers = n_layers
    if n_ctx is not None:
        table = opt.model.decoder.embed_positions
        table.weight = torch.nn.Parameter(table.weight[: n_ctx + 2].detach().clone())
        opt.config.max_position_embeddings = n_ctx


@dataclasses.dataclass(frozen=True)
class _Plan:
    """An OPT of a configuration's sizes, and the configuration of TransformerLens that fits it."""

    opt: Any
    cfg: Any
    asked: Any


def _plan(cfg: Any) -> _Plan | None:
    """None where no OPT has such sizes."""
    if isinstance(cfg, dict):
        cfg = HookedTransformerConfig.unwrap(cfg)
    if not dataclasses.is_dataclass(cfg) or (getattr(cfg, "n_devices", 1) or 1) > 1:
        return None
    if getattr(cfg, "original_architecture", None) not in (None, "OPTForCausalLM"):
        return None
    heads = cfg.n_heads if cfg.n_heads > 0 else cfg.d_model // cfg.d_head
    keys = getattr(cfg, "n_key_value_heads", None)
    vocabulary = cfg.d_vocab
    if vocabulary == -1 and served.official(getattr(cfg, "tokenizer_name", None)):
        vocabulary = served.VOCABULARY
    out = getattr(cfg, "d_vocab_out", -1)
    if heads * cfg.d_head != cfg.d_model or keys not in (None, heads) or vocabulary < 1:
        return None
    if out not in (-1, vocabulary) or cfg.d_model < 2:
        return None
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    act = cfg.act_fn if cfg.act_fn in ("relu", "gelu", "gelu_new", "silu") else "relu"
    opt = served.random_opt(
        layers=cfg.n_layers, heads=heads, width=cfg.d_model, inner=cfg.d_mlp or 4 * cfg.d_model,
        vocabulary=vocabulary, context=cfg.n_ctx, act=act,
    )  # fmt: skip
    return _Plan(opt.to(cfg.dtype), _fitting(cfg, heads, vocabulary, act), cfg)


def _fitting(cfg: Any, heads: int, vocabulary: int, act: str) -> HookedTransformerConfig:
    """What was asked, with OPT's own architecture."""
    flags = {name: getattr(cfg, name, False) for name in (*_FLAGS, "use_hook_tokens")}
    return HookedTransformerConfig(
        n_layers=cfg.n_layers, d_model=cfg.d_model, n_ctx=cfg.n_ctx, d_head=cfg.d_head, n_heads=heads,
        d_mlp=cfg.d_mlp or 4 * cfg.d_model, act_fn=act, d_vocab=vocabulary, normalization_type="LN",
        positional_embedding_type="standard", init_weights=False, eps=1e-5, dtype=cfg.dtype,
        device=cfg.device, default_prepend_bos=cfg.default_prepend_bos,
        model_name=getattr(cfg, "model_name", "custom"),
        tokenizer_name=getattr(cfg, "tokenizer_name", None), original_architecture="OPTForCausalLM",
        **flags,
    )  # fmt: skip


class _Theirs:
    """TransformerLens' own objects over what is served."""

    keeps_class = True

    def named_hooked(self, load: Any, opt: Any, tokenizer: Any, asked: dict[str, Any]) -> Any:
        """HookedTransformer over this OPT."""
        kept = {k: v for k, v in asked.items() if k not in (*_PROCESSING, "first_n_layers", "n_ctx")}
        kept |= dict.fromkeys(_PROCESSING, False) | {"hf_model": opt, "tokenizer": tokenizer}
        with _asking_for(opt.config):
            return reach.watched(load(HookedTransformer, OPT, **kept))

    def configured_hooked(self, model: Any, init: Any, plan: _Plan, *args: Any, **kwargs: Any) -> None:
        """HookedTransformer of a configuration."""
        with _asking_for(plan.opt.config):
            init(model, plan.cfg, *args, **kwargs)
        state = model.fill_missing_keys(convert_opt_weights(plan.opt, plan.cfg))
        model.load_state_dict(state, strict=False)
        reach.watched(model)

    def bridge(self, opt: Any, tokenizer: Any, name: str) -> Any:
        """A bridge over this OPT, whose compatibility mode leaves the weights as they are."""
        opt.set_attn_implementation("eager")
        bridge = build_bridge_from_module(
            opt, "OPTForCausalLM", hf_config=copy.deepcopy(opt.config), tokenizer=tokenizer, model_name=name
        )
        return reach.watched(_unprocessed(bridge))


class _Ours:
    """Our towers over what is served."""

    keeps_class = False

    def named_hooked(self, load: Any, opt: Any, tokenizer: Any, asked: dict[str, Any]) -> Any:
        """The tower, in the dtype and with the defaults that were asked for."""
        dtype = asked.get("torch_dtype", asked.get("dtype", torch.float32))
        opt.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return _tower(opt, tokenizer, asked.get("default_prepend_bos"), asked.get("default_padding_side"))

    def configured_hooked(
        self,
        plan: _Plan,
        tokenizer: Any = None,
        move_to_device: bool = True,
        default_padding_side: Any = None,
    ) -> Any:
        """The tower, with the flags of the configuration set."""
        cfg = plan.cfg
        if tokenizer is None and cfg.tokenizer_name is not None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.tokenizer_name)
        tower = _tower(plan.opt, tokenizer, cfg.default_prepend_bos, default_padding_side)
        for flag in _FLAGS:
            if getattr(cfg, flag):
                getattr(tower, f"set_{flag}")(True)
        return tower

    def bridge(self, opt: Any, tokenizer: Any, name: str) -> Any:
        """The tower."""
        return _unprocessed(_tower(opt, tokenizer, None, None))


def _tower(opt: Any, tokenizer: Any, prepend_bos: bool | None, padding_side: str | None) -> Any:
    import mm_adapters as mm

    if padding_side is not None and tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = padding_side
    tower: Any = mm.wrap(opt, tokenizer=tokenizer).language
    if prepend_bos is not None:
        tower.cfg.default_prepend_bos = prepend_bos
    return reach.watched(tower)


def _unprocessed(model: Any) -> Any:
    """The model, whose compatibility mode processes no weights whatever is asked."""
    enable = getattr(model, "enable_compatibility_mode", lambda **_: None)
    if enable is not None:
        keep = {"no_processing": True}
        model.__dict__["enable_compatibility_mode"] = lambda *_, **asked: enable(
            **{k: v for k, v in asked.items() if k == "disable_warnings"} | keep
        )
    return model


@contextmanager
def _asking_for(config: Any) -> Any:
    """TransformerLens reads this configuration inside, and what it makes is not served again."""
    _config_now.append(config)
    try:
        yield
    finally:
        _config_now.pop()
