"""One small declarative file per family; `records()` lists what they say."""

from mm_adapters._registry import records

__all__ = ["records"]
