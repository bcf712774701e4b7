"""Which parameters are differentiated: all, cross-attention keys and values, LoRA, globs or a list."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from mm_adapters import InputError, UnknownFamilyError
from mm_adapters.records.spec import Output
from mm_adapters.sites.site_map import SiteMap


def select(module: nn.Module, wanted: str | Sequence[str]) -> tuple[str, ...]:
    """Names of parameters, in the module's order.

    `wanted` is "all", "cross_attention_kv", "lora", or one or more names or globs.

    Raises: InputError if anything asked for matches no parameter.
    """
    have = [n for n, p in module.named_parameters() if p.is_floating_point()]
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen: set[str] = set()
    for pattern in asked:
        found = _found(module, have, pattern)
        if not found:
            raise InputError(
                f"No parameter of {type(module).__name__} is {pattern!r}. It has {len(have)}, "
                f"{', '.join(have[:3])}, ...; or pass 'all', 'cross_attention_kv', 'lora', or globs."
            )
        chosen |= set(found)
    if not chosen:
        raise InputError("No parameters were asked for.")
    return tuple(n for n in have if n in chosen)


def _found(module: nn.Module, have: list[str], pattern: str) -> list[str]:
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
    found: set[str] = set()
    for tower in towers:
        for stack, blocks in tower.parts.items():
            for path, places in zip(tower.stacks[stack], blocks, strict=True):
                for site in ("cross_attn.hook_k", "cross_attn.hook_v"):
                    if isinstance(place := places.get(site), Output):
                        found.add(".".join(p for p in (tower.path, path, place.path) if p))
    return found
