"""One small declarative file per family; importing the package registers them all."""

import importlib
import pkgutil

from mm_adapters.records.registry import records

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["records"]
