"""What is inside one block of an unknown model, told by names and shapes, in the words of a record."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from torch import nn

from mm_adapters.records import parts

_NAMES = {
    "q": r"(q|query|q_proj|to_q|q_lin|wq|query_proj)",
    "k": r"(k|key|k_proj|to_k|k_lin|wk|key_proj)",
    "v": r"(v|value|v_proj|to_v|v_lin|wv|value_proj)",
    "qkv": r"(qkv|qkv_proj|in_proj|wqkv|c_attn|query_key_value|to_qkv)",
}
_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "nhead",
    "config.num_attention_heads",
    "config.num_heads",
)
_OTHER_NORMS = (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)  # Over channels or rows.


@dataclass(frozen=True)
class _Attention:
    """`path` is the module that has all of it; `parts` are the projections' paths from there."""

    path: str
    parts: Mapping[str, str]
    heads: str | None
    width: int


def has_attention(block: nn.Module) -> bool:
    """Whether a module attends, as far as names tell."""
    return _fused(block) is not None or _attention(block) is not None


def block_lines(block: nn.Module) -> list[str]:
    """The parts of a block, as lines of a record."""
    lines = ['{"hook_resid_pre": Input("")}']
    fused, projections = _fused(block), _attention(block)
    path = fused if fused is not None else projections.path if projections is not None else None
    first, second = _norms(block, path)
    lines += [f"| {_norm(block, first, 'ln1')}"] if first else []
    if fused is not None:
        lines += [f'| fused_attention("{fused}")']
    elif projections is not None:
        word = "qkv_attention" if "qkv" in projections.parts else "attention"
        plain = inspect.signature(getattr(parts, word)).parameters
        named = "".join(f', {n}="{p}"' for n, p in projections.parts.items() if p != plain[n].default)
        heads = f'heads="{projections.heads}"' if projections.heads else 'heads="???"'
        lines += [f'| {word}("{projections.path}"{named}, {heads})']
    windows = [name for name in vars(block) if re.search("window|shift", name)]
    if windows:
        lines += [
            f"# check: it attends within windows: {', '.join(windows)}. See Stages.",
            "# hook_attn_out is what comes back in the order of the stream.",
        ]
    elif path:
        lines += [
            f'| {{"hook_attn_out": Output("{path}")}}',
            '| {"hook_resid_mid": Residual("hook_resid_pre", "hook_attn_out")}',
        ]
    lines += [f"| {_norm(block, second, 'ln2')}"] if second else []
    lines += _mlp(block, path)
    vectors = [n for n, p in block.named_parameters(recurse=False) if p.ndim == 1]
    if vectors:
        lines += [f"# check: the block has {', '.join(vectors)} of its own. See gain= of Output, and Stream."]
    return [*lines, '| {"hook_resid_post": Output("")},']


def _fused(block: nn.Module) -> str | None:
    return next((n for n, m in block.named_modules() if n and isinstance(m, nn.MultiheadAttention)), None)


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def _attention(block: nn.Module) -> _Attention | None:
    linears = _linears(block)
    named: dict[str, str] = {}
    for path in linears:
        leaf = path.rpartition(".")[2].lower()
        for part, pattern in _NAMES.items():
            if re.fullmatch(pattern, leaf):
                named.setdefault(part, path)
    inner = ["qkv"] if "qkv" in named else ["q", "k", "v"]
    if not set(inner) <= named.keys() or "." not in named[inner[0]]:
        return None
    width = linears[named[inner[0]]].out_features // (3 if inner == ["qkv"] else 1)
    candidates = [p for p, m in linears.items() if p not in named.values() and m.in_features == width]
    start = named[inner[0]].split(".")
    # The one that shares most of its path with the others.
    out = max(candidates, key=lambda p: _in_common(p.split("."), start), default=None)
    parts = {part: named[part] for part in inner}
    if out is not None and _in_common(out.split("."), start):
        parts["o"] = out
    path = _shared(list(parts.values()))
    if not path:
        return None
    heads = _head_attribute(block, path, next(iter(parts.values())))
    return _Attention(path, {n: p.removeprefix(f"{path}.") for n, p in parts.items()}, heads, width)


def _head_attribute(block: nn.Module, path: str, inside: str) -> str | None:
    """Where the number of heads is, seen from the attention: on it, or on what holds its projections."""
    steps = inside.removeprefix(f"{path}.").split(".")[:-1]
    for prefix in ("", *(".".join(steps[: i + 1]) + "." for i in range(len(steps)))):
        for name in _HEADS:
            try:
                if isinstance(attrgetter(prefix + name)(block.get_submodule(path)), int):
                    return prefix + name
            except AttributeError:
                continue
    return None


def _shared(paths: list[str]) -> str:
    split = [p.split(".")[:-1] for p in paths]
    shared = []
    for steps in zip(*split, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)


def _in_common(one: list[str], other: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last axis: torch's, or a gain and a small number of its own."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    gain = getattr(module, "weight", None)
    has_eps = any(hasattr(module, name) for name in ("eps", "variance_epsilon"))
    return has_eps and gain is not None and gain.ndim == 1 and not isinstance(module, _OTHER_NORMS)


def is_rms(norm: nn.Module) -> bool:
    """Whether a norm takes no mean away: those have no offset, and are no LayerNorm."""
    return not isinstance(norm, nn.LayerNorm) and getattr(norm, "bias", None) is None


def _norms(block: nn.Module, attention: str | None) -> tuple[str | None, str | None]:
    """The norms of the block's own width, in the order they are registered."""
    names = [n for n, m in block.named_modules() if is_norm(m)]
    outside = [n for n in names if attention is None or not n.startswith(f"{attention}.")]
    # In a block that normalises what a branch gives, the norm lies in the branch.
    names_left = (
        outside if len(outside) > 1 else [n for n in names if not re.search(r"(q|k|query|key)_?norm$", n)]
    )
    return (names_left[0] if names_left else None), (names_left[1] if len(names_left) > 1 else None)


def _norm(block: nn.Module, path: str, name: str) -> str:
    kind = ', kind="RMS"' if is_rms(block.get_submodule(path)) else ""
    return f'norm("{path}", "{name}"{kind})'


def _mlp(block: nn.Module, attention: str | None) -> list[str]:
    linears = {
        n: m for n, m in _linears(block).items() if attention is None or not n.startswith(f"{attention}.")
    }
    for down, last in linears.items():
        ups = [
            n
            for n, m in linears.items()
            if n != down and m.out_features == last.in_features and m.in_features == last.out_features
        ]
        if not ups or last.in_features < last.out_features:
            continue
        path = _shared([*ups, down])
        local = [p.removeprefix(f"{path}.") if path else p for p in (*ups, down)]
        out = f'| {{"hook_mlp_out": Output("{path or down}")}}'
        if not path:
            pre, post = f'| {{"mlp.hook_pre": Output("{ups[0]}")}}', f'| {{"mlp.hook_post": Input("{down}")}}'
            return [pre, post, out]
        if len(ups) > 1:
            return [f'| gated_mlp("{path}", gate="{local[0]}", up="{local[1]}", down="{local[-1]}")', out]
        return [f'| mlp("{path}", up="{local[0]}", down="{local[-1]}")', out]
    return ["# No MLP was found: two Linears, the second of which undoes the first's shape."]
