"""The names that a service without this package has for a model and its functions."""

from __future__ import annotations

import json
from typing import Any

from mm_adapters._errors import InputError
from mm_adapters.nnsight_engine.protocol import JobModel
from mm_adapters.nnsight_engine.tasks import TASKS
from mm_adapters.sites.single_tower import single_tower


def stock_service_key(model: JobModel) -> str:
    """The key under which a stock service serves the same checkpoint.

    Raises: InputError if it serves none of this kind.
    """
    from mm_adapters import zoo

    origin = model.origin
    assert origin is not None
    name = str(zoo.path(origin.name)) if origin.name in zoo.NAMES else origin.name
    checkpoint: dict[str, Any] = {"repo_id": name, "revision": origin.options.get("revision")}
    if "automodel" in origin.options:
        raise InputError(
            f"A service without mm-interp makes of {origin.name} the pipeline that it names, not a "
            f"{origin.options['automodel']}. Serve it yourself: mm-interp ndif up."
        )
    if model.kind == "diffusion":
        return f"nnsight.modeling.diffusion.DiffusionModel:{json.dumps(checkpoint)}"
    if model.kind not in TASKS or name.startswith("open_clip:"):
        raise InputError(
            f"A service without mm-interp cannot serve {origin.name}: nnsight has no class for a "
            f"{model.kind} of {model.sitemap.family}. Serve it yourself: mm-interp ndif up."
        )
    checkpoint["task"] = TASKS[model.kind]
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(checkpoint)}"


def host_function(model: JobModel, name: str, arguments: dict[str, Any]) -> str:
    """A stock service's name of the function that is `name` here; its sandbox gets a name only."""
    if model.kind == "diffusion" or name == "_generate":
        return "generate"
    if name == "_forward" and model.kind == "contrastive":
        tower = single_tower(model.sitemap, arguments)
        return (tower.mount.run if tower else None) or "_call"
    return "_call" if name in ("_forward", "_plain") else name
