"""Any timm tower that transformers has wrapped."""

from mm_adapters.records import ModelRecord, TowerMount, register

_TOWER = {"vision": TowerMount("timm_model", run="", takes="pixel_values", gives="pooler_output")}
register(ModelRecord("timm_wrapper", "tower", ("transformers:TimmWrapperModel",), _TOWER))
