"""Towers of other libraries, as open_clip wraps them: timm's images, transformers' texts."""

from mm_adapters._registry import register
from mm_adapters._spec import Mount, Mounts

register(Mounts("open_clip_timm", "tower", ("open_clip:TimmModel",),
                {"vision": Mount("trunk", run="", takes="x", gives="")}))  # fmt: skip
register(Mounts("open_clip_hf", "tower", ("open_clip:HFTextEncoder",),
                {"text": Mount("transformer", run="", takes="x", gives="")}))  # fmt: skip
