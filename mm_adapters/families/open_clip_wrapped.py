"""Towers of other libraries, as open_clip wraps them: timm's images, transformers' texts."""

from mm_adapters.records import ModelRecord, TowerMount, register

register(ModelRecord("open_clip_timm", "tower", ("open_clip:TimmModel",),
                {"vision": TowerMount("trunk", run="", takes="x", gives="")}))  # fmt: skip
register(ModelRecord("open_clip_hf", "tower", ("open_clip:HFTextEncoder",),
                {"text": TowerMount("transformer", run="", takes="x", gives="")}))  # fmt: skip
