"""How a model is put together, by its class, and the error for a class that no family covers."""

from __future__ import annotations

import difflib
from typing import Any

from mm_adapters._errors import UnknownFamilyError
from mm_adapters.records.registry import _RECORDS, find, key_of
from mm_adapters.records.spec import Kind, ModelRecord, Tower, TowerMount


def lookup(model: Any) -> ModelRecord:
    """How `model` is put together; a tower that stands alone is a composite of one.

    Raises: UnknownFamilyError if no family covers its class.
    """
    model_record = find(ModelRecord, model)
    if model_record is not None:
        return model_record
    tower = find(Tower, model)
    if tower is not None:
        return ModelRecord(tower.name, "tower", tower.classes, {tower.role: TowerMount("")})
    raise unknown(model, ModelRecord)


def unknown(model: Any, kind: type) -> UnknownFamilyError:
    """The error for a class that no family covers: it names the nearest and shows a record to start from.

    The record is read off the model; without its modules (a class alone) only its outline is shown.
    """
    from mm_adapters.sites.draft import draft, outline
    from mm_adapters.sites.nearest import nearest

    key = key_of(type(model))
    near, record = nearest(model), draft(model)
    if not near:
        known = sorted(k for t, k in _RECORDS if t in (ModelRecord, Tower) and not k.startswith("name:"))
        close = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or known
        near = f"The nearest by name are {', '.join(close)}."
    if not record:
        record = outline(model, kind)
    return UnknownFamilyError(
        f"No family covers {key}. {near} Describe it in a record, as mm_adapters/families/README.md "
        "says, and run that before you load the model. As far as it can be read off the model:\n\n"
        f"{record}\n"
    )


def kind_of(model: Any) -> Kind:
    """ "contrastive", "vlm", "diffusion" or "tower"."""
    return lookup(model).kind
