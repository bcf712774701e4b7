"""Any timm tower that transformers has wrapped."""

from mm_adapters._registry import register
from mm_adapters._spec import Mount, Mounts

_TOWER = {"vision": Mount("timm_model", run="", takes="pixel_values", gives="pooler_output")}
register(Mounts("timm_wrapper", "tower", ("transformers:TimmWrapperModel",), _TOWER))
