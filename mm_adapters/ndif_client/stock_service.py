"""What a service without this package calls a model and its functions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mm_adapters.sites.single_tower import single_tower

if TYPE_CHECKING:
    from mm_adapters.ndif_client.remotable import ServedModel
    from mm_adapters.traced import TracedModel
from mm_adapters.nnsight_engine.tasks import TASKS


def stock_service_key(model: TracedModel) -> str:
    """The key under which a stock service serves the same checkpoint.

    Raises: ValueError if it serves none of this kind.
    """
    from mm_adapters import zoo

    origin = model.origin
    assert origin is not None
    name = str(zoo.path(origin.name)) if origin.name in zoo.NAMES else origin.name
    about: dict[str, Any] = {"repo_id": name, "revision": origin.options.get("revision")}
    if "automodel" in origin.options:
        raise ValueError(
            f"A service without mm-interp makes of {origin.name} the pipeline that it names, not a "
            f"{origin.options['automodel']}. Serve it yourself: mm-interp ndif up."
        )
    if model.kind == "diffusion":
        return f"nnsight.modeling.diffusion.DiffusionModel:{json.dumps(about)}"
    if model.kind not in TASKS or name.startswith("open_clip:"):
        raise ValueError(
            f"A service without mm-interp cannot serve {origin.name}: nnsight has no class for a "
            f"{model.kind} of {model.sitemap.family}. Serve it yourself: mm-interp ndif up."
        )
    return (
        f"nnsight.modeling.transformers.TransformersModel:{json.dumps(about | {'task': TASKS[model.kind]})}"
    )


def host_function(model: ServedModel, name: str, arguments: dict[str, Any]) -> str:
    """What a stock service calls the function that we call `name`; its sandbox is told a name only."""
    kind = model.kind  # type: ignore[attr-defined]
    if kind == "diffusion" or name == "_generate":
        return "generate"
    if name == "_forward" and kind == "contrastive":
        tower = single_tower(model.sitemap, arguments)  # type: ignore[attr-defined]
        return (tower.mount.run if tower else None) or "_call"
    return "_call" if name in ("_forward", "_plain") else name
