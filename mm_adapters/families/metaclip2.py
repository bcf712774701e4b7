"""MetaCLIP 2 as transformers writes it: CLIP's parts under other classes (arXiv 2507.22062)."""

from dataclasses import replace

from mm_adapters.families import clip
from mm_adapters.records import register

for _tower, _name in ((clip.VISION, "Vision"), (clip.TEXT, "Text")):
    _class = f"transformers:MetaClip2{_name}Model"
    register(replace(_tower, name=f"metaclip2_{_name.lower()}", classes=(_class,)))
register(replace(clip.CLIP, name="metaclip2", classes=("transformers:MetaClip2Model",)))
