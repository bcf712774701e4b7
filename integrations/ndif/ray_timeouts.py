"""Longer timeouts for Ray's parts on a busy machine. Imported by every process of the environment.

Ray 2.60 (_private/node.py, raylet_start_wait_time_s; _private/services.py, get_node_with_retry) gives up
on a node that has not registered after 30 s, a number that nothing sets. Here each look-up of a node is
repeated. The environment's .pth file names this module, so it imports nothing but the standard
library, and does nothing before Ray is imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

TIMEOUT_S = 300
_MARK = "MM_INTERP_NDIF_RUN"  # As service.py; not imported from there, for that would take time.


def extend_timeout(services: Any, timeout_s: float = TIMEOUT_S) -> None:
    """Makes `get_node` of Ray's services repeat its look-up until the node is there."""
    get_node_once = services.get_node

    def get_node(*args: Any, **kwargs: Any) -> Any:
        end = time.monotonic() + timeout_s
        while True:
            try:
                return get_node_once(*args, **kwargs)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    services.get_node = get_node


class _Once(MetaPathFinder):
    """Finds `ray._private.services` as other finders do, and extends its timeout once it is executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != "ray._private.services":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                extend_timeout(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _MARK in os.environ:
    sys.meta_path.insert(0, _Once())
