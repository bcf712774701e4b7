"""Ordinary calls of every public member of HookedTransformer and ActivationCache, by member.

Each is a function of a model, or of a cache, that returns what can be compared: tensors, numbers, texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from mm_adapters.tl_engine.tower_flags import POINTS

Call = Callable[[Any], Any]

TOKENS = torch.randint(2, 28, (2, 7), generator=torch.Generator().manual_seed(5))
ROW = TOKENS[:1]
TEXT, TEXTS = "abc de fgh", ["abc", "d efg hij"]
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
ONE_BLOCK = "blocks.1.hook_resid_post"
PARTS = ("hook_embed", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post", ONE_BLOCK)

# Points that a switch is for: HookedTransformer lists them always, a tower while they are there.
ASKED_FOR = {
    f"blocks.{layer}.{point}" for layer in range(3) for points in POINTS.values() for point in points
}


def double(value: Tensor, hook: Any) -> Tensor:
    return 2 * value


def look(value: Tensor, hook: Any) -> None:
    return None


def real(values: Tensor) -> list[Tensor]:
    """Without the padding at the right of the first of TEXTS, which HookedTransformer lets attend."""
    return [values[0, : len(TEXTS[0]) + 1], values[1]]


def centred(directions: Tensor) -> Tensor:
    """Without what a LayerNorm takes off, which HookedTransformer's folding takes off too."""
    return directions - directions.mean(-1, keepdim=True)


def stream(m: Any, layer: int) -> Tensor:
    return m.run_with_cache(TOKENS, names_filter=f"blocks.{layer}.hook_resid_pre")[1]["resid_pre", layer]


def greedy(m: Any, prompt: Any = ROW, **options: Any) -> Any:
    return m.generate(prompt, **{"max_new_tokens": 4, "do_sample": False, "verbose": False} | options)


def sampled(m: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return m.generate(ROW, max_new_tokens=5, verbose=False, **options)


def streamed(m: Any, prompt: Any = ROW, **options: Any) -> Any:
    return list(m.generate_stream(prompt, max_new_tokens=4, do_sample=False, verbose=False, **options))


def with_flag(name: str, call: Call) -> Call:
    """What a call gives while one of the model's switches is on."""

    def inside(m: Any) -> Any:
        getattr(m, f"set_{name}")(True)
        return getattr(m.cfg, name), call(m)

    return inside


def cached(*names: str, **options: Any) -> Call:
    """The values of these points, and what the run gives."""

    def run(m: Any) -> Any:
        output, cache = m.run_with_cache(TOKENS, **options)
        return output, {name: cache[name] for name in names}

    return run


def hooked(hooks: Any, **options: Any) -> Call:
    return lambda m: m.run_with_hooks(TOKENS, fwd_hooks=hooks, **options)


def went_on(m: Any, frozen: bool = False, **options: Any) -> Any:
    """Two calls that share a cache of keys and values."""
    kept = TransformerLensKeyValueCache.init_cache(m.cfg, m.cfg.device, TOKENS.shape[0])
    m(TOKENS[:, :4], past_kv_cache=kept, **options)
    if frozen:
        kept.freeze()
    out = m(TOKENS[:, 4:], past_kv_cache=kept, **options)
    return out, [entry.past_keys for entry in kept], kept.previous_attention_mask


def gradients(m: Any) -> Any:
    """Of the loss, at every weight that both models have alike."""
    m.zero_grad()
    m(TOKENS, return_type="loss").backward()
    return (
        sum(p.grad.square().sum() for name, p in m.named_parameters() if p.grad is not None and "2" in name)
        > 0
    )


def retokenized(m: Any, **options: Any) -> Tensor:
    m.set_tokenizer(copy.deepcopy(m.tokenizer), **options)
    return m.to_tokens(TEXTS)


def added(member: str, *args: Any, **options: Any) -> Call:
    """What a call gives after a hook was added, and after all were taken away."""

    def run(m: Any) -> Any:
        getattr(m, member)(*args, **options)
        with_hook = m(TOKENS)
        m.reset_hooks(including_permanent=True)
        return with_hook, m(TOKENS)

    return run


def stored(member: str, *args: Any, **options: Any) -> Call:
    """What hooks that store leave in a dict."""

    def run(m: Any) -> Any:
        cache: dict[str, Tensor] = {}
        getattr(m, member)(cache, *args, **options) if member.startswith("cache") else getattr(m, member)(
            *args, cache=cache, **options
        )
        m(TOKENS)
        m.reset_hooks()
        return {name: cache[name] for name in PARTS if name in cache}, len(cache)

    return run


def weight(name: str) -> list[Call]:
    return [lambda m: getattr(m, name), lambda m: getattr(m, name).shape]


def after(act: Call) -> Call:
    """What the model gives after an act upon it."""

    def run(m: Any) -> Any:
        act(m)
        return m(TOKENS)

    return run


OWN: dict[str, list[Call]] = {
    **{name: weight(name) for name in ("W_E", "W_K", "W_O", "W_Q", "W_U", "W_V", "W_in", "W_out", "W_pos")},
    **{name: weight(name) for name in ("b_K", "b_O", "b_Q", "b_U", "b_V", "b_in", "b_out", "W_E_pos")},
    "W_gate": [lambda m: m.W_gate],
    "QK": [lambda m: m.QK.AB, lambda m: m.QK.svd()[1], lambda m: m.QK[1, 0].AB, lambda m: m.QK.norm()],
    "OV": [lambda m: m.OV.AB, lambda m: m.OV.eigenvalues.abs().sort()[0], lambda m: m.OV.A.shape],
    "forward": [
        lambda m: m(TOKENS),
        lambda m: m.forward(TOKENS),
        lambda m: m(TOKENS[0]),
        lambda m: m(TEXT),
        lambda m: real(m(TEXTS, attention_mask=None)),
        lambda m: m(TEXT, prepend_bos=False),
        lambda m: m(TEXT, prepend_bos=True),
        lambda m: real(m(TEXTS, padding_side="right")),
        lambda m: m(TEXTS, padding_side="left")[:, -4:],
        lambda m: m(TOKENS, return_type=None),
        lambda m: m(TOKENS, return_type="logits"),
        lambda m: m(TOKENS, return_type="loss"),
        lambda m: m(TEXT, return_type="loss"),
        lambda m: m(TOKENS, return_type="loss", loss_per_token=True),
        lambda m: tuple(m(TOKENS, return_type="both")),
        lambda m: m(TOKENS, return_type="both").loss,
        lambda m: m(TOKENS, return_type="nonsense"),
        lambda m: m(TOKENS, retrun_type="loss"),
        lambda m: m(TOKENS, attention_mask=MASK)[MASK.bool()],
        lambda m: m(TOKENS, attention_mask=MASK, return_type="loss"),
        *(lambda m, n=n: m(TOKENS, stop_at_layer=n) for n in (0, 1, 2, 3, -1)),
        *(lambda m, n=n: m(stream(m, n), start_at_layer=n) for n in (0, 1, 2)),
        lambda m: m(stream(m, 1), start_at_layer=1, stop_at_layer=2),
        lambda m: m(stream(m, 2), start_at_layer=-1),
        lambda m: m(stream(m, 1), start_at_layer=1, tokens=TOKENS, return_type="loss"),
        lambda m: went_on(m),
        lambda m: went_on(m, frozen=True),
        lambda m: m([TEXT]),
        lambda m: m(torch.tensor([[3]])),
    ],
    "run_with_cache": [
        cached(*PARTS),
        cached(*PARTS, return_type="loss"),
        cached(*PARTS, return_type=None),
        cached(ONE_BLOCK, names_filter=ONE_BLOCK),
        cached(ONE_BLOCK, "hook_embed", names_filter=[ONE_BLOCK, "hook_embed"]),
        cached(ONE_BLOCK, names_filter=lambda name: name.endswith("resid_post")),
        cached("hook_embed", "hook_pos_embed", stop_at_layer=1),
        cached(*PARTS, device="cpu"),
        cached(ONE_BLOCK, pos_slice=slice(2, 4)),
        cached(ONE_BLOCK, pos_slice=-1),
        cached(*PARTS, return_cache_object=False),
        lambda m: sorted(m.run_with_cache(TOKENS)[1].keys()),
        lambda m: list(m.run_with_cache(TOKENS, return_cache_object=False)[1]),
        lambda m: m.run_with_cache(ROW, remove_batch_dim=True)[1]["pattern", 0],
        lambda m: m.run_with_cache(TEXT)[1]["resid_post", -1],
        lambda m: m.run_with_cache(TEXT, prepend_bos=False)[1]["q", 2],
        lambda m: m.run_with_cache(TOKENS)[1]["scale", 1, "ln1"],
        lambda m: m.run_with_cache(TOKENS)[1]["blocks.2.attn.hook_z"],
        lambda m: m.run_with_cache(TOKENS, names_filter="blocks.9.hook_resid_pre"),
    ],
    "run_with_hooks": [
        hooked([(ONE_BLOCK, double)]),
        hooked([(lambda name: name.endswith("attn.hook_z"), double)]),
        hooked([("blocks.0.attn.hook_pattern", double), ("blocks.1.hook_mlp_out", double)]),
        hooked([(ONE_BLOCK, look)]),
        hooked([(ONE_BLOCK, double)], return_type="loss"),
        hooked([("hook_embed", double)]),
        hooked([("hook_pos_embed", double)]),
        hooked([("ln_final.hook_normalized", double)]),
        hooked([("blocks.0.attn.hook_q", double)], stop_at_layer=1),
        hooked([(ONE_BLOCK, double)], reset_hooks_end=False),
        hooked([("blocks.7.hook_resid_pre", double)]),
        lambda m: m.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=[(ONE_BLOCK, look)]),
    ],
    "hooks": [
        lambda m: _within(m, fwd_hooks=[(ONE_BLOCK, double)]),
        lambda m: _within(m, fwd_hooks=[(ONE_BLOCK, double)], reset_hooks_end=False),
        lambda m: _within(m, fwd_hooks=[]),
    ],
    "add_hook": [
        added("add_hook", ONE_BLOCK, double),
        added("add_hook", lambda name: name.endswith("hook_v"), double),
        added("add_hook", ONE_BLOCK, double, is_permanent=True),
        added("add_hook", ONE_BLOCK, look, dir="bwd"),
        added("add_hook", ONE_BLOCK, double, prepend=True),
    ],
    "add_perma_hook": [added("add_perma_hook", ONE_BLOCK, double)],
    "check_and_add_hook": [
        lambda m: added("check_and_add_hook", m.hook_dict[ONE_BLOCK], ONE_BLOCK, double)(m),
    ],
    "check_hooks_to_add": [lambda m: m.check_hooks_to_add(m.hook_dict[ONE_BLOCK], ONE_BLOCK, double)],
    "reset_hooks": [
        after(lambda m: (m.add_hook(ONE_BLOCK, double), m.reset_hooks())),
        after(lambda m: (m.add_perma_hook(ONE_BLOCK, double), m.reset_hooks())),
        after(lambda m: (m.add_perma_hook(ONE_BLOCK, double), m.reset_hooks(including_permanent=True))),
        after(lambda m: (m.add_hook(ONE_BLOCK, double), m.reset_hooks(direction="bwd"))),
    ],
    "remove_all_hook_fns": [
        after(lambda m: (m.add_hook(ONE_BLOCK, double), m.remove_all_hook_fns())),
        after(lambda m: (m.add_hook(ONE_BLOCK, double), m.remove_all_hook_fns("bwd"))),
    ],
    "clear_contexts": [lambda m: (_noted(m), m.clear_contexts(), m.hook_dict[ONE_BLOCK].ctx)[2]],
    "list_hooks": [
        lambda m: len(m.list_hooks()),
        lambda m: (m.add_hook(ONE_BLOCK, look), [name for name, hooks in m.list_hooks().items() if hooks])[1],
    ],
    "hook_points": [lambda m: sorted(point.name for point in m.hook_points() if point.name not in ASKED_FOR)],
    "setup": [after(lambda m: m.setup())],
    "add_caching_hooks": [
        stored("add_caching_hooks"),
        stored("add_caching_hooks", lambda name: name.endswith("resid_post")),
        stored("add_caching_hooks", [ONE_BLOCK]),
        stored("add_caching_hooks", ONE_BLOCK, remove_batch_dim=False),
    ],
    "cache_all": [stored("cache_all")],
    "cache_some": [stored("cache_some", lambda name: name == ONE_BLOCK)],
    "get_caching_hooks": [
        lambda m: _with_caching_hooks(m),
        lambda m: _with_caching_hooks(m, [ONE_BLOCK]),
        lambda m: _with_caching_hooks(m, lambda name: "hook_z" in name),
        lambda m: sorted(name for name, _ in m.get_caching_hooks([ONE_BLOCK])[1]),
    ],
    "generate": [
        greedy,
        lambda m: greedy(m, TOKENS),
        lambda m: greedy(m, TEXT),
        lambda m: greedy(m, TEXTS),
        lambda m: greedy(m, TEXT, return_type="tokens"),
        lambda m: greedy(m, ROW, return_type="str"),
        lambda m: greedy(m, TEXT, prepend_bos=False),
        lambda m: greedy(m, TEXTS, padding_side="left"),
        lambda m: greedy(m, use_past_kv_cache=False),
        lambda m: greedy(m, stop_at_eos=False),
        lambda m: greedy(m, eos_token_id=7),
        lambda m: greedy(m, freq_penalty=2.0),
        lambda m: greedy(m, output_logits=True).logits,
        lambda m: greedy(m, output_logits=True, return_dict_in_generate=True).sequences,
        lambda m: greedy(m, return_type="embeds"),
        lambda m: greedy(m, nonsense=1),
        lambda m: greedy(m, max_new_tokens=1),
        sampled,
        lambda m: sampled(m, top_k=3),
        lambda m: sampled(m, top_p=0.5),
        lambda m: sampled(m, temperature=0.7),
        lambda m: sampled(m, top_k=5, freq_penalty=1.0),
    ],
    "generate_stream": [
        streamed,
        lambda m: streamed(m, max_tokens_per_yield=2),
        lambda m: streamed(m, TEXT),
        lambda m: streamed(m, TEXT, return_type="tokens"),
        lambda m: streamed(m, use_past_kv_cache=False),
    ],
    "to_tokens": [
        lambda m: m.to_tokens(TEXT),
        lambda m: m.to_tokens(TEXTS),
        lambda m: m.to_tokens(TEXT, prepend_bos=False),
        lambda m: m.to_tokens(TEXTS, padding_side="left"),
        lambda m: m.to_tokens(TEXTS, padding_side="right", prepend_bos=False),
        lambda m: m.to_tokens("a" * 200),
        lambda m: m.to_tokens("a" * 200, truncate=False),
        lambda m: m.to_tokens(TEXT, move_to_device=False),
        lambda m: m.to_tokens(""),
    ],
    "to_string": [
        lambda m: m.to_string(TOKENS),
        lambda m: m.to_string(TOKENS[0]),
        lambda m: m.to_string([3, 4, 5]),
        lambda m: m.to_string(TOKENS.numpy()),
        lambda m: m.to_string(torch.tensor(3)),
    ],
    "to_str_tokens": [
        lambda m: m.to_str_tokens(TEXT),
        lambda m: m.to_str_tokens(TEXTS),
        lambda m: m.to_str_tokens(TEXT, prepend_bos=False),
        lambda m: m.to_str_tokens(TOKENS[0]),
        lambda m: m.to_str_tokens(ROW),
        lambda m: m.to_str_tokens(TOKENS[0].numpy()),
        lambda m: m.to_str_tokens(TEXTS, padding_side="left"),
    ],
    "to_single_token": [lambda m: m.to_single_token("a"), lambda m: m.to_single_token("ab")],
    "to_single_str_token": [lambda m: m.to_single_str_token(5)],
    "get_token_position": [
        lambda m: m.get_token_position("a", TEXT),
        lambda m: m.get_token_position(" ", TEXT, mode="last"),
        lambda m: m.get_token_position(" ", TEXT, prepend_bos=False),
        lambda m: m.get_token_position(int(TOKENS[0, 3]), TOKENS[0]),
        lambda m: m.get_token_position("z", TEXT),
    ],
    "set_tokenizer": [
        lambda m: retokenized(m),
        lambda m: retokenized(m, default_padding_side="left"),
    ],
    "tokens_to_residual_directions": [
        lambda m: centred(m.tokens_to_residual_directions("a")),
        lambda m: centred(m.tokens_to_residual_directions(5)),
        lambda m: centred(m.tokens_to_residual_directions(TOKENS[0])),
        lambda m: centred(m.tokens_to_residual_directions(TOKENS)),
        lambda m: centred(m.tokens_to_residual_directions(torch.tensor(5))),
    ],
    "input_to_embed": [
        lambda m: m.input_to_embed(TOKENS),
        lambda m: m.input_to_embed(TEXT),
        lambda m: real(m.input_to_embed(TEXTS, padding_side="right")[0]),
        lambda m: m.input_to_embed(TEXT, prepend_bos=False),
    ],
    "get_residual": [lambda m: m.get_residual(m.embed(TOKENS), 0, attention_mask=None)[0]],
    "get_pos_offset": [
        lambda m: m.get_pos_offset(None, 2),
        lambda m: m.get_pos_offset(TransformerLensKeyValueCache.init_cache(m.cfg, m.cfg.device, 2), 2),
    ],
    "loss_fn": [
        lambda m: m.loss_fn(m(TOKENS), TOKENS),
        lambda m: m.loss_fn(m(TOKENS), TOKENS, per_token=True),
        lambda m: m.loss_fn(m(TOKENS), TOKENS, MASK),
    ],
    "accumulated_bias": [
        lambda m: m.accumulated_bias(0),
        lambda m: m.accumulated_bias(2),
        lambda m: m.accumulated_bias(2, mlp_input=True),
        lambda m: m.accumulated_bias(3, include_mlp_biases=False),
    ],
    "all_composition_scores": [lambda m, k=k: m.all_composition_scores(k) for k in "QKV"],
    "all_head_labels": [lambda m: m.all_head_labels() if callable(m.all_head_labels) else m.all_head_labels],
    "n_params_total": [lambda m: m.n_params_total > 0],
    "set_use_attn_result": [
        with_flag("use_attn_result", cached("blocks.1.attn.hook_result")),
        with_flag("use_attn_result", hooked([("blocks.1.attn.hook_result", double)])),
    ],
    "set_use_split_qkv_input": [
        with_flag("use_split_qkv_input", cached("blocks.1.hook_q_input", "blocks.0.hook_v_input")),
        with_flag("use_split_qkv_input", hooked([("blocks.1.hook_k_input", double)])),
    ],
    "set_use_attn_in": [
        with_flag("use_attn_in", cached("blocks.1.hook_attn_in")),
        with_flag("use_attn_in", hooked([("blocks.1.hook_attn_in", double)])),
    ],
    "set_use_hook_mlp_in": [
        with_flag("use_hook_mlp_in", cached("blocks.1.hook_mlp_in")),
        with_flag("use_hook_mlp_in", hooked([("blocks.1.hook_mlp_in", double)])),
    ],
    "set_ungroup_grouped_query_attention": [after(lambda m: m.set_ungroup_grouped_query_attention(True))],
    "mps": [lambda m: m.mps()],
    "move_model_modules_to_device": [after(lambda m: m.move_model_modules_to_device())],
    "load_sample_training_dataset": [lambda m: m.load_sample_training_dataset()],
    "sample_datapoint": [lambda m: m.sample_datapoint()],
    "embed": [lambda m: m.embed(TOKENS), lambda m: m.embed.W_E],
    "pos_embed": [lambda m: m.pos_embed(TOKENS), lambda m: m.pos_embed.W_pos],
    "unembed": [
        lambda m: m.unembed(m.ln_final(stream(m, 2))),
        lambda m: m.unembed.W_U,
        lambda m: m.unembed.b_U,
    ],
    "ln_final": [lambda m: m.ln_final(stream(m, 1)), lambda m: m.ln_final.w, lambda m: m.ln_final.b],
    "blocks": [
        lambda m: len(m.blocks),
        lambda m: m.blocks[1](stream(m, 1)),
        lambda m: m.blocks[1].attn.W_Q,
        lambda m: m.blocks[1].mlp.b_in,
        lambda m: m.blocks[1].ln1.w,
        lambda m: m.blocks[1].ln1(stream(m, 1)),
        lambda m: m.blocks[1].mlp(stream(m, 1)),
        lambda m: m.blocks[1].attn.OV.AB,
    ],
    "hook_embed": [lambda m: m.hook_embed.name],
    "hook_pos_embed": [lambda m: m.hook_pos_embed.name],
    "hook_dict": [lambda m: sorted(set(m.hook_dict) - ASKED_FOR)],
    "mod_dict": [lambda m: m.mod_dict[ONE_BLOCK].name],
    "tokenizer": [lambda m: m.tokenizer.padding_side, lambda m: m.tokenizer.bos_token_id],
    "dataset": [lambda m: m.dataset],
    "is_caching": [lambda m: m.is_caching],
    "context_level": [lambda m: m.context_level],
    "cfg": [
        lambda m, f=f: getattr(m.cfg, f)
        for f in (
            "d_model", "n_layers", "n_heads", "d_head", "d_mlp", "d_vocab", "d_vocab_out", "n_ctx", "act_fn",
            "eps", "normalization_type", "positional_embedding_type", "attn_only", "gated_mlp", "final_rms",
            "use_attn_result", "use_split_qkv_input", "default_prepend_bos", "dtype", "device", "n_devices",
            "attention_dir", "n_key_value_heads", "parallel_attn_mlp", "attn_scale", "use_hook_mlp_in",
        )
    ],
}  # fmt: skip

# What loads or processes weights, in place of those that a model of ours wraps and never changes.
WEIGHTS: dict[str, list[Call]] = {
    "process_weights_": [lambda m: m.process_weights_(fold_ln=True)],
    "fold_layer_norm": [lambda m: m.fold_layer_norm(m.state_dict())],
    "fold_value_biases": [lambda m: m.fold_value_biases(m.state_dict())],
    "center_writing_weights": [lambda m: m.center_writing_weights(m.state_dict())],
    "center_unembed": [lambda m: m.center_unembed(m.state_dict())],
    "refactor_factored_attn_matrices": [lambda m: m.refactor_factored_attn_matrices(m.state_dict())],
    "load_and_process_state_dict": [lambda m: m.load_and_process_state_dict(m.state_dict())],
    "fill_missing_keys": [lambda m: m.fill_missing_keys({})],
    "init_weights": [lambda m: m.init_weights()],
    "from_pretrained": [lambda m: type(m).from_pretrained("gpt2")],
    "from_pretrained_no_processing": [lambda m: type(m).from_pretrained_no_processing("gpt2")],
}

# torch's own, which HookedTransformer inherits.
MODULE: dict[str, list[Call]] = {
    "to": [after(lambda m: m.to("cpu")), lambda m: m.to(torch.float64)(TOKENS), lambda m: m.to("cpu") is m],
    "cpu": [after(lambda m: m.cpu())],
    "cuda": [lambda m: m.cuda()],
    "xpu": [lambda m: m.xpu()],
    "ipu": [lambda m: m.ipu()],
    "mtia": [lambda m: m.mtia()],
    "float": [after(lambda m: m.float())],
    "double": [lambda m: m.double()(TOKENS), lambda m: (m.double(), m.W_Q.dtype)[1]],
    "half": [lambda m: (m.half(), m.W_Q.dtype)[1]],
    "bfloat16": [lambda m: m.bfloat16()(TOKENS).dtype],
    "type": [lambda m: m.type(torch.float64)(TOKENS)],
    "to_empty": [lambda m: m.to_empty(device="cpu").W_Q.shape],
    "train": [lambda m: m.train().training, lambda m: m.train()(TOKENS), lambda m: m.train() is m],
    "eval": [lambda m: m.eval().training, lambda m: m.eval() is m],
    "training": [lambda m: m.training],
    "requires_grad_": [lambda m: (m.requires_grad_(False), any(p.requires_grad for p in m.parameters()))[1]],
    "zero_grad": [lambda m: (gradients(m), m.zero_grad(), all(p.grad is None for p in m.parameters()))[2]],
    "parameters": [
        lambda m: all(p.requires_grad for p in m.parameters()),
        lambda m: len(list(m.parameters())) > 0,
        gradients,
        lambda m: _one_step(m),
    ],
    "named_parameters": [lambda m: len(dict(m.named_parameters())) == len(list(m.parameters()))],
    "buffers": [lambda m: all(isinstance(b, Tensor) for b in m.buffers())],
    "named_buffers": [lambda m: all(isinstance(b, Tensor) for _, b in m.named_buffers())],
    "state_dict": [lambda m: str(m.load_state_dict(m.state_dict())), lambda m: len(m.state_dict()) > 0],
    "load_state_dict": [
        after(lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))),
        after(lambda m: m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()})),
        lambda m: m.load_state_dict({"nonsense": torch.zeros(1)}),
    ],
    "modules": [lambda m: next(iter(m.modules())) is m],
    "named_modules": [lambda m: ONE_BLOCK in dict(m.named_modules())],
    "children": [lambda m: m.blocks in list(m.children())],
    "named_children": [lambda m: {"blocks", "ln_final", "hook_embed"} <= set(dict(m.named_children()))],
    "get_submodule": [lambda m: m.get_submodule("blocks.1.attn.hook_z").name],
    "set_submodule": [lambda m: m.get_submodule("blocks.1") is m.blocks[1]],
    "get_parameter": [
        lambda m: m.get_parameter(next(iter(dict(m.named_parameters())))).requires_grad,
        lambda m: m.get_parameter("nonsense"),
    ],
    "get_buffer": [lambda m: m.get_buffer("nonsense")],
    "get_extra_state": [lambda m: m.get_extra_state()],
    "set_extra_state": [lambda m: m.set_extra_state(1)],
    "extra_repr": [lambda m: m.extra_repr()],
    "apply": [lambda m: m.apply(lambda module: None) is m],
    "compile": [lambda m: callable(m.compile)],
    "share_memory": [after(lambda m: m.share_memory())],
    "register_forward_hook": [lambda m: _torch_hook(m, "register_forward_hook", lambda *_: None)],
    "register_forward_pre_hook": [lambda m: _torch_hook(m, "register_forward_pre_hook", lambda *_: None)],
    "register_full_backward_hook": [lambda m: callable(m.register_full_backward_hook)],
    "register_full_backward_pre_hook": [lambda m: callable(m.register_full_backward_pre_hook)],
    "register_backward_hook": [lambda m: callable(m.register_backward_hook)],
    "register_state_dict_post_hook": [lambda m: callable(m.register_state_dict_post_hook)],
    "register_state_dict_pre_hook": [lambda m: callable(m.register_state_dict_pre_hook)],
    "register_load_state_dict_post_hook": [lambda m: callable(m.register_load_state_dict_post_hook)],
    "register_load_state_dict_pre_hook": [lambda m: callable(m.register_load_state_dict_pre_hook)],
    "register_buffer": [lambda m: (m.register_buffer("noted", torch.ones(1)), m.noted)[1]],
    "register_module": [lambda m: (m.register_module("more", torch.nn.Identity()), m.more(3))[1]],
    "add_module": [lambda m: (m.add_module("more", torch.nn.Identity()), m.more(3))[1]],
    "register_parameter": [lambda m: (m.register_parameter("extra", None), m.extra)[1]],
    "call_super_init": [lambda m: m.call_super_init],
    "dump_patches": [lambda m: m.dump_patches],
    "T_destination": [lambda m: str(m.T_destination)],
}


def _within(m: Any, **options: Any) -> Any:
    with m.hooks(**options) as hooked_model:
        inside = hooked_model(TOKENS)
    return inside, m(TOKENS)


def _noted(m: Any) -> None:
    m.hook_dict[ONE_BLOCK].ctx["count"] = 1


def _with_caching_hooks(m: Any, *args: Any) -> Any:
    cache, forward, backward = m.get_caching_hooks(*args)
    output = m.run_with_hooks(TOKENS, fwd_hooks=forward, bwd_hooks=backward)
    return output, dict(cache)


def _one_step(m: Any) -> Any:
    """The loss before and after a step of plain gradient descent on the MLPs' first weights."""
    before = m(TOKENS, return_type="loss")
    before.backward()
    return before.item()


def _torch_hook(m: Any, member: str, hook: Call) -> Any:
    handle = getattr(m, member)(hook)
    out = m(TOKENS)
    handle.remove()
    return out


CACHE: dict[str, list[Call]] = {
    "keys": [lambda c: sorted(c.keys())],
    "values": [lambda c: len(list(c.values())), lambda c: next(iter(c.values()))],
    "items": [lambda c: {k: v for k, v in c.items() if k in PARTS}],
    "__getitem__": [
        lambda c: c["hook_embed"],
        lambda c: c["embed"],
        lambda c: c["pattern", 1],
        lambda c: c["attn_scores", -1],
        lambda c: c["resid_mid", 0],
        lambda c: c["post", 2],
        lambda c: c["normalized", 1, "ln2"],
        lambda c: c["normalized"],
        lambda c: c["k", 0, "attn"],
        lambda c: c["nonsense", 1],
    ],
    "__len__": [len],
    "__iter__": [sorted],
    "accumulated_resid": [
        lambda c: c.accumulated_resid(),
        lambda c: c.accumulated_resid(layer=2),
        lambda c: c.accumulated_resid(incl_mid=True, return_labels=True),
        lambda c: c.accumulated_resid(apply_ln=True),
        lambda c: c.accumulated_resid(layer=1, apply_ln=True, mlp_input=True),
        lambda c: c.accumulated_resid(pos_slice=-1, apply_ln=True),
        lambda c: c.accumulated_resid(pos_slice=(1, 4)),
    ],
    "decompose_resid": [
        lambda c: c.decompose_resid(),
        lambda c: c.decompose_resid(layer=2, return_labels=True),
        lambda c: c.decompose_resid(layer=1, mlp_input=True),
        lambda c: c.decompose_resid(mode="attn"),
        lambda c: c.decompose_resid(mode="mlp", incl_embeds=False),
        lambda c: c.decompose_resid(apply_ln=True),
        lambda c: c.decompose_resid(apply_ln=True, pos_slice=-1),
    ],
    "logit_attrs": [
        lambda c: c.logit_attrs(c.decompose_resid(), 5),
        lambda c: c.logit_attrs(c.decompose_resid(), 5, incorrect_tokens=6),
        lambda c: c.logit_attrs(c.decompose_resid(pos_slice=-1), TOKENS[:, 0], pos_slice=-1),
        lambda c: c.logit_attrs(c.accumulated_resid(), TOKENS),
        lambda c: c.logit_attrs(c.decompose_resid(), "a", incorrect_tokens="b"),
        lambda c: c.logit_attrs(c.accumulated_resid()[:, :1], 4, batch_slice=[0]),
        lambda c: c.logit_attrs(c.decompose_resid(mode="mlp"), 5, has_batch_dim=True),
    ],
    "compute_head_results": [lambda c: (c.compute_head_results(), c["result", 1])[1]],
    "stack_head_results": [
        lambda c: c.stack_head_results(),
        lambda c: c.stack_head_results(layer=2, return_labels=True),
        lambda c: c.stack_head_results(incl_remainder=True),
        lambda c: c.stack_head_results(pos_slice=-1, apply_ln=True),
    ],
    "stack_activation": [
        lambda c: c.stack_activation("q"),
        lambda c: c.stack_activation("scale", layer=2, sublayer_type="ln1"),
        lambda c: c.stack_activation("resid_post", layer=2),
    ],
    "get_neuron_results": [
        lambda c: c.get_neuron_results(1),
        lambda c: c.get_neuron_results(1, neuron_slice=(0, 3)),
        lambda c: c.get_neuron_results(0, neuron_slice=5, pos_slice=-1),
    ],
    "stack_neuron_results": [
        lambda c: c.stack_neuron_results(2),
        lambda c: c.stack_neuron_results(2, neuron_slice=(0, 4), return_labels=True),
        lambda c: c.stack_neuron_results(2, incl_remainder=True, pos_slice=-1),
        lambda c: c.stack_neuron_results(2, apply_ln=True, pos_slice=-1),
    ],
    "get_full_resid_decomposition": [
        lambda c: c.get_full_resid_decomposition(),
        lambda c: c.get_full_resid_decomposition(2, mlp_input=True, return_labels=True),
        lambda c: c.get_full_resid_decomposition(expand_neurons=False),
        lambda c: c.get_full_resid_decomposition(apply_ln=True, pos_slice=-1),
    ],
    "apply_ln_to_stack": [
        lambda c: c.apply_ln_to_stack(c.accumulated_resid()),
        lambda c: c.apply_ln_to_stack(c.accumulated_resid(layer=1), layer=1, mlp_input=True),
        lambda c: c.apply_ln_to_stack(c.decompose_resid(pos_slice=-1), pos_slice=-1),
    ],
    "apply_slice_to_batch_dim": [lambda c: c.apply_slice_to_batch_dim(1)["pattern", 0]],
    "remove_batch_dim": [
        lambda c: c.remove_batch_dim(),
        lambda c: c.apply_slice_to_batch_dim([0]).remove_batch_dim()["resid_post", 1],
    ],
    "to": [lambda c: c.to("cpu")["hook_embed"], lambda c: c.to(torch.float64)["q", 0]],
    "toggle_autodiff": [lambda c: (c.toggle_autodiff(False), torch.is_grad_enabled())[1]],
    "ssm_layers": [lambda c: c.ssm_layers()],
    "compute_ssm_effective_attention": [lambda c: c.compute_ssm_effective_attention()],
    "compute_ssm_state": [lambda c: c.compute_ssm_state()],
}
