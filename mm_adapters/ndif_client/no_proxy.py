"""A service on this machine is asked without a proxy, whatever the environment says of proxies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from urllib.parse import urlsplit


@contextmanager
def directly(url: str | None) -> Iterator[None]:
    """Inside, httpx and websocket ask the URL's host directly if it is on the loopback; no other is changed.

    Neither takes a host for which there is no proxy, and nnsight makes its clients itself: both read it
    from the environment, which is as before afterwards.
    """
    host = urlsplit(url or "").hostname
    if host is None or not is_loopback(host):
        yield
        return
    before = os.environ.get("no_proxy")
    others = before if before is not None else os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = ",".join(filter(None, [others, host]))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("no_proxy", None)
        else:
            os.environ["no_proxy"] = before


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its name or number."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
