"""pyvene on multimodal models: every family registered from its record, and no hook of others deleted.

model = mm.load("tiny-llava")
site = "language.blocks.2.hook_resid_post"
config = pyvene.IntervenableConfig([intervention(model, site, pyvene.RotatedSpaceIntervention)])
intervenable = MMIntervenableModel(config, model)
intervenable({"input_ids": ...}, [{...}], {"sources->base": 7})
"""

from integrations.pyvene.alignment import Alignment, align, interchange_accuracy
from integrations.pyvene.interventions import (
    BoundlessPositions,
    MapIntervention,
    SAEInterchange,
    SAEIntervention,
    StepGate,
)
from integrations.pyvene.model import MMIntervenableModel
from integrations.pyvene.registration import component_of, register
from integrations.pyvene.representation import intervention, units

__all__ = [
    "Alignment",
    "BoundlessPositions",
    "MMIntervenableModel",
    "MapIntervention",
    "SAEInterchange",
    "SAEIntervention",
    "StepGate",
    "align",
    "component_of",
    "interchange_accuracy",
    "intervention",
    "register",
    "units",
]
