"""Python's own sockets of the service stay on this machine. Imported by every process of the environment.

Ray 2.60 gives its metrics, which ask for no token, to every interface (autoscaler/_private/monitor.py,
dashboard/head.py, reporter agent), whatever address it is told. A socket that would listen on all interfaces
listens on the loopback here. The environment's .pth file names this module, so it imports nothing but the
standard library.
"""

from __future__ import annotations

import os
import socket
from typing import Any

_MARK = "MM_INTERP_NDIF_RUN"  # As service.py; not imported from there, for that would take time.
ALL = {"", "0.0.0.0", "::"}


def on_loopback(address: Any, family: int) -> Any:
    """An address to bind to, on the loopback if it names all interfaces."""
    if family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple) and address[0] in ALL:
        return ("127.0.0.1" if family == socket.AF_INET else "::1", *address[1:])
    return address


def keep_on_loopback() -> None:
    """Makes `socket.socket.bind` of this process do so."""

    class Loopback(socket.socket):
        def bind(self, address: Any, /) -> None:
            super().bind(on_loopback(address, self.family))

    socket.socket = Loopback  # type: ignore[misc]


if _MARK in os.environ:
    keep_on_loopback()
