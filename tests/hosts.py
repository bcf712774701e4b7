"""The public members of the hosts' classes, as the installed versions have them."""

from __future__ import annotations

from typing import Any

from torch import nn


def public(cls: type, *, beyond: type = nn.Module) -> set[str]:
    """A class' public names, without those of `beyond`."""
    return {name for name in dir(cls) if not name.startswith("_")} - set(dir(beyond))


def transformer_lens_members() -> dict[str, set[str]]:
    """By class of TransformerLens: what a tower or its cache stands in for."""
    import transformer_lens as tl
    from transformer_lens.model_bridge import TransformerBridge

    classes: dict[str, Any] = {"TransformerBridge": TransformerBridge}
    if hasattr(tl, "HookedTransformer"):  # Not in TransformerLens 4.
        classes["HookedTransformer"] = tl.HookedTransformer
    found = {name: public(cls) for name, cls in classes.items()}
    return found | {"ActivationCache": public(tl.ActivationCache, beyond=object)}
