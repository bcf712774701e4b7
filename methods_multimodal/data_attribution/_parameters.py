"""Which parameters are differentiated: all, cross-attention keys and values, LoRA, globs or a list."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from mm_adapters import InputError, SiteMap, UnknownFamilyError
from mm_adapters.records import Output


def select(module: nn.Module, parameters: str | Sequence[str]) -> tuple[str, ...]:
    """Names of parameters, in the module's order.

    `parameters` is "all", "cross_attention_kv", "lora", or one or more names or globs.

    Raises: InputError if anything asked for matches no parameter.
    """
    have = [n for n, p in module.named_parameters() if p.is_floating_point()]
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    chosen: set[str] = set()
    for pattern in patterns:
        names = _matching(module, have, pattern)
        if not names:
            raise InputError(
                f"No parameter of {type(module).__name__} is {pattern!r}. It has {len(have)}, "
                f"{', '.join(have[:3])}, ...; or pass 'all', 'cross_attention_kv', 'lora', or globs."
            )
        chosen |= set(names)
    if not chosen:
        raise InputError("No parameters were asked for.")
    return tuple(n for n in have if n in chosen)


def _matching(module: nn.Module, have: list[str], pattern: str) -> list[str]:
    if pattern == "all":
        return have
    if pattern == "lora":
        return [n for n in have if "lora_" in n]
    if pattern == "cross_attention_kv":
        paths = _cross_attention(module)
        return [n for n in have if n.rpartition(".")[0] in paths]
    return [n for n in have if fnmatchcase(n, pattern)]


def _cross_attention(module: nn.Module) -> set[str]:
    """The modules that give cross-attention its keys and values, as the family's record says."""
    try:
        towers = SiteMap(module).towers.values()
    except UnknownFamilyError:
        return set()
    paths: set[str] = set()
    for tower in towers:
        for stack, blocks in tower.parts.items():
            for path, parts in zip(tower.stacks[stack], blocks, strict=True):
                for site in ("cross_attn.hook_k", "cross_attn.hook_v"):
                    if isinstance(location := parts.get(site), Output):
                        paths.add(".".join(p for p in (tower.path, path, location.path) if p))
    return paths
